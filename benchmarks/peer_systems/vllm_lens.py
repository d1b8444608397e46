"""vllm-lens, a plugin of vLLM that adds to the residual stream: cannot be installed beside ours."""

from headway.benchmarks.peer_systems.protocol import Peer

PEER = Peer(
    name="vllm-lens",
    module="vllm_lens",
    system="",
    methods=("caa",),
    package="vllm-lens",
    version="1.3.0",
    unavailable="requires exactly vLLM 0.30.0, another than the one that Headway runs on",
)
