"""Tensors by PyTorch's own account: names, dtypes and bytes. What the other side of every comparison is made of."""
import hashlib, json

import numpy as np
import torch

# Every dtype that torch.save can write, quantised ones aside.
DTYPES = ("uint8 int8 int16 int32 int64 float16 float32 float64 bfloat16 bool complex32 complex64 complex128 uint16 uint32 uint64 "
          "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2 bits8 bits16 bits1x8 bits2x4 "
          "bits4x2 bcomplex32").split()

# Those that the safetensors library writes, and those that it reads back into PyTorch as well.
SAFETENSORS_WRITES = [it for it in DTYPES if not it.startswith("bits") and it not in ("complex32", "complex128", "bcomplex32")]
SAFETENSORS_READS = [it for it in SAFETENSORS_WRITES if it not in ("float8_e8m0fnu", "float4_e2m1fn_x2")]


def dtype_name(t):
    return str(t.dtype).removeprefix("torch.")


def stored(t):
    """`t` without its lazy conjugation and negation: a view of the bytes as they are stored."""
    if t.is_complex() and t.is_conj(): t = t.conj()
    return t._neg_view() if t.is_neg() else t


def contiguous_bytes(t):
    """The bytes of `t` as stored, in row-major order. numpy gathers them, so that every dtype takes the same way."""
    if t.numel() == 0: return b""
    size = t.element_size()
    raw = t.detach().untyped_storage()
    strides = [n * size for n in t.stride()]
    raw = np.asarray(torch.empty(0, dtype=torch.uint8).set_(raw))
    return np.ndarray(tuple(t.shape), f"V{size}", raw.data, t.storage_offset() * size, strides).tobytes()


def resolved_bytes(t):
    """The bytes of the values of `t`, in row-major order."""
    return contiguous_bytes(t if t.is_quantized else t.detach().resolve_conj().resolve_neg())


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def digest_of_hashes(hashes):
    """sha256 over the sorted lines "name dtype shape sha256", shape as [2,3]. `hashes` are (name, dtype, shape, sha256)."""
    lines = sorted(f"{name} {dtype} {json.dumps(list(shape), separators=(',', ':'))} {sha}\n" for name, dtype, shape, sha in hashes)
    return sha256("".join(lines).encode())


def digest(state):
    """What `unladen load --digest` prints for a state dict."""
    return digest_of_hashes((name, dtype_name(t), t.shape, sha256(resolved_bytes(t))) for name, t in state.items())


def flat(value, path=""):
    """Every tensor of nested dicts, lists and tuples with its full path, in order."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, it in items: yield from flat(it, f"{path}.{key}" if path else str(key))


def of_bytes(dtype, n, shape=None, first=1):
    """`n` elements whose bytes count up from `first`: every byte differs from its neighbours, so a wrong order shows."""
    size = torch.empty(0, dtype=dtype).element_size()
    raw = bytes((first + 3 * i) % 2 if dtype == torch.bool else (first + 3 * i) % 256 for i in range(n * size))
    t = torch.tensor(list(raw), dtype=torch.uint8).view(dtype)
    return t if shape is None else t.reshape(shape)
