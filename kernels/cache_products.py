"""Products of vectors with the cached keys and values of whole sequences, on CPU without a copy.

Attention of single query rows, and what its gradients consist of, are products of two forms, with
keys and with values k_j: x . k_j for every j, and sum_j w_j k_j. `cache_products.c`, compiled when
Headway is installed, reads the blocks of the cache where they are, once for all heads that share a
KV head. Layout of the cache: see `segment_attention.py`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from headway.kernels.cache_rows import cache_rows
from headway.kernels.compiled import compiled_library


class CacheProductsError(ValueError):
    """The products were asked for with tensors that do not fit."""


class CacheProducts:
    """Products of rows with cached keys and values of whole sequences, which stay where they are.

    kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], float32, bfloat16 or float16.
    blocks: int64 [num_rows, blocks per row]; entries beyond a row's end are never read.
    lengths: int64 [num_rows], in 1 .. blocks per row * block_size.
    None of them may change as long as products are asked for.

    num_keys: the greatest length. is_ragged: whether there are others. num_kv_heads, head_size: of
    the cache.

    Sums are taken in float32. What is in the cache beyond a row's length does not matter, NaN
    included. With the kernel, the result of a row has the same bits whatever the other rows are,
    and whatever the number of threads. Where it was not built, and on other devices, torch
    multiplies by float32 copies, made once: that holds only as far as torch warrants it.

    Raises CacheProductsError, here and in the products, for tensors that do not fit; nothing is
    computed then. An entry of `blocks` that is not a block is found by the first product.
    """

    def __init__(self, kv_cache: Tensor, blocks: Tensor, lengths: Tensor) -> None:
        _check(kv_cache, blocks, lengths)
        num_blocks, self.num_kv_heads, block_size, width = kv_cache.shape
        self.head_size = width // 2
        capacity = blocks.shape[1] * block_size
        per_row = lengths.tolist()
        if per_row and not 1 <= min(per_row) <= max(per_row) <= capacity:
            raise CacheProductsError(f"lengths must be in 1 .. {capacity}: {per_row}")
        self.num_keys: int = max(per_row, default=0)
        self.is_ragged = len(set(per_row)) > 1
        self.lengths = lengths
        self._tensors = kv_cache, blocks.contiguous(), lengths.contiguous()
        self._copies: tuple[Tensor, Tensor] | None = None
        self._kernel = library() if kv_cache.device.type == "cpu" else None
        if self._kernel is None:
            return
        _, blocks, lengths = self._tensors
        self._call = _Call(
            kv_cache=kv_cache.data_ptr(),
            blocks=blocks.data_ptr(),
            lengths=lengths.data_ptr(),
            block_stride=kv_cache.stride(0),
            kv_head_stride=kv_cache.stride(1),
            num_blocks=num_blocks,
            num_rows=len(blocks),
            blocks_per_row=blocks.shape[1],
            num_keys=self.num_keys,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            block_size=block_size,
            dtype=_DTYPES[kv_cache.dtype],
        )

    def with_keys(self, x: Tensor) -> Tensor:
        """x . k_j, float32 [num_rows, num_heads, num_vectors, num_keys], 0 from a row's length on.

        x: float32 [num_rows, num_heads, num_vectors, head_size]; head h meets the keys of KV head
        h // (num_heads / num_kv_heads).
        """
        return self._product(_WITH_KEYS, x)

    def with_values(self, x: Tensor) -> Tensor:
        """x . v_j; shapes as in `with_keys`."""
        return self._product(_WITH_VALUES, x)

    def mix_keys(self, w: Tensor) -> Tensor:
        """sum_j w_j k_j below a row's length, [num_rows, num_heads, num_vectors, head_size].

        w: float32 [num_rows, num_heads, num_vectors, num_keys], not read from a row's length on.
        The result is float32.
        """
        return self._product(_MIX_KEYS, w)

    def mix_values(self, w: Tensor) -> Tensor:
        """sum_j w_j v_j; shapes as in `mix_keys`."""
        return self._product(_MIX_VALUES, w)

    def _product(self, operation: int, vectors: Tensor) -> Tensor:
        mixed = operation in (_MIX_KEYS, _MIX_VALUES)
        sizes = self.head_size, self.num_keys
        width, output_width = reversed(sizes) if mixed else sizes
        self._check_vectors(vectors, width)
        if not vectors.numel():
            return vectors.new_zeros(*vectors.shape[:3], output_width)
        if self._kernel is None:
            return self._with_copies(operation, vectors)
        vectors = vectors.contiguous()
        output = vectors.new_empty(*vectors.shape[:3], output_width)
        call = self._call
        call.vectors, call.output = vectors.data_ptr(), output.data_ptr()
        _, call.num_heads, call.num_vectors, _ = vectors.shape
        call.operation = operation
        error = self._kernel.headway_cache_products(ctypes.byref(call))
        if error == _NO_SUCH_BLOCK:
            raise CacheProductsError(f"blocks must be in 0 .. {call.num_blocks - 1}")
        if error:
            raise MemoryError("no memory for the kernel of products with the cache")
        return output

    def _with_copies(self, operation: int, vectors: Tensor) -> Tensor:
        """Products by torch, with a copy of the keys and values in float32, padding zeroed."""
        num_rows, num_heads, num_vectors, width = vectors.shape
        if self._copies is None:
            self._copies = self._copied()
        key, value = self._copies
        matrix = {
            _WITH_KEYS: key,
            _WITH_VALUES: value.transpose(2, 3),
            _MIX_KEYS: key.transpose(2, 3),
            _MIX_VALUES: value,
        }[operation]
        if operation in (_MIX_KEYS, _MIX_VALUES):
            vectors = vectors.masked_fill(self._padding()[:, None, None], 0.0)
        batch, group = num_rows * self.num_kv_heads, num_heads // self.num_kv_heads
        grouped = vectors.reshape(batch, group * num_vectors, width)
        output = torch.bmm(grouped, matrix.reshape(batch, width, matrix.shape[3]))
        return output.view(num_rows, num_heads, num_vectors, matrix.shape[3])

    def _copied(self) -> tuple[Tensor, Tensor]:
        kv_cache, blocks, lengths = self._tensors
        num_blocks, _, block_size, _ = kv_cache.shape
        used = -(-self.num_keys // block_size)
        first_key = torch.arange(used, device=lengths.device) * block_size
        blocks = blocks[:, :used].masked_fill(first_key >= lengths[:, None], 0)
        if ((blocks < 0) | (blocks >= num_blocks)).any():
            raise CacheProductsError(f"blocks must be in 0 .. {num_blocks - 1}")
        key, value = cache_rows(kv_cache, blocks)
        key, value = key[..., : self.num_keys], value[:, :, : self.num_keys]
        padding = self._padding()[:, None]
        return (
            key.float().masked_fill(padding[:, :, None], 0.0),
            value.float().masked_fill(padding[..., None], 0.0),
        )

    def _padding(self) -> Tensor:
        """bool [num_rows, num_keys]: what is beyond a row's length."""
        lengths = self._tensors[2]
        return torch.arange(self.num_keys, device=lengths.device) >= lengths[:, None]

    def _check_vectors(self, vectors: Tensor, width: int) -> None:
        kv_cache, blocks, _ = self._tensors
        if vectors.dtype is not torch.float32 or vectors.device != kv_cache.device:
            raise CacheProductsError("vectors must be float32, on the device of the cache")
        if vectors.ndim != 4 or vectors.shape[0] != len(blocks) or vectors.shape[3] != width:
            raise CacheProductsError(
                f"vectors must be [{len(blocks)}, num_heads, num_vectors, {width}]; "
                f"got {list(vectors.shape)}"
            )
        if vectors.shape[1] % self.num_kv_heads:
            raise CacheProductsError(
                f"{vectors.shape[1]} heads cannot share {self.num_kv_heads} KV heads"
            )


def library() -> ctypes.CDLL | None:
    """The compiled kernel, None if it was not built with this installation."""
    return compiled_library("cache_products")


def _check(kv_cache: Tensor, blocks: Tensor, lengths: Tensor) -> None:
    if kv_cache.dtype not in _DTYPES:
        raise CacheProductsError(
            f"the cache must be float32, bfloat16 or float16; got {kv_cache.dtype}"
        )
    if kv_cache.ndim != 4 or not kv_cache.numel() or kv_cache.shape[3] % 2:
        raise CacheProductsError(
            "the cache must be [num_blocks, num_kv_heads, block_size, 2 * head_size]; "
            f"got {list(kv_cache.shape)}"
        )
    if kv_cache.stride()[2:] != (kv_cache.shape[3], 1):
        raise CacheProductsError("the cache must be made of dense blocks of keys and values")
    if blocks.dtype is not torch.int64 or lengths.dtype is not torch.int64:
        raise CacheProductsError("blocks and lengths must be int64")
    if not kv_cache.device == blocks.device == lengths.device:
        raise CacheProductsError("cache, blocks and lengths must be on one device")
    if blocks.ndim != 2 or lengths.shape != blocks.shape[:1]:
        raise CacheProductsError(
            "every row must have its blocks and a length; "
            f"got {list(blocks.shape)} and {list(lengths.shape)}"
        )


_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Caches that can be read, and the number that cache_products.c knows a dtype by."""

_WITH_KEYS, _WITH_VALUES, _MIX_KEYS, _MIX_VALUES = range(4)
_NO_SUCH_BLOCK = 2

_POINTERS = ("kv_cache", "blocks", "lengths", "vectors", "output")
_SIZES = (
    "block_stride",
    "kv_head_stride",
    "num_blocks",
    "num_rows",
    "blocks_per_row",
    "num_keys",
    "num_heads",
    "num_kv_heads",
    "num_vectors",
    "head_size",
    "block_size",
)


class _Call(ctypes.Structure):
    """`struct call` of cache_products.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("dtype", ctypes.c_int32),
        ("operation", ctypes.c_int32),
    )
