"""saklas, an OpenAI-compatible server on transformers: cannot be asked for the same edit."""

from headway.benchmarks.peer_systems.protocol import Peer

PEER = Peer(
    name="saklas",
    module="saklas",
    system="",
    methods=("caa",),
    package="saklas",
    version="5.3.0",
    unavailable="none of its HTTP routes takes a vector: a request names a subspace that the "
    "server has fitted itself, with weights of its own for each layer, so that the same edit "
    "cannot be asked for",
)
