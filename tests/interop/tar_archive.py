"""Writes checkpoints as PyTorch 0.1.1 to 0.1.9 did, which PyTorch still reads."""
import io, pickle, struct, tarfile

import torch


def save_tar(state, path, views=(), how=tarfile.PAX_FORMAT):
    """A checkpoint as PyTorch 0.1.1 to 0.1.9 wrote it. `views` are names whose storage is a part of another's."""
    kinds = {torch.float32: "Float", torch.int64: "Long", torch.uint8: "Byte", torch.float64: "Double"}
    numbers, storages, tensors, parts = iter(range(1000, 10**6)), {}, [], []
    for name, t in state.items():
        raw = t.untyped_storage()
        if raw.data_ptr() not in storages: storages[raw.data_ptr()] = (next(numbers), t.dtype, bytes(raw))
        root, storage, offset = storages[raw.data_ptr()][0], None, t.storage_offset()
        if name in views:
            storage, offset = next(numbers), 0
            parts.append((storage, root, t.storage_offset(), raw.nbytes() // t.element_size() - t.storage_offset()))
        tensors.append((next(numbers), root if storage is None else storage, t, offset))
    dump = lambda it: pickle.dumps(it, protocol=2)

    class Pickler(pickle.Pickler):
        def persistent_id(self, it):
            return next((str(number) for number, _, t, _ in tensors if t is it), None)

    stores = dump(len(storages))
    for number, dtype, raw in storages.values():
        stores += dump((number, "cpu", getattr(torch, kinds[dtype] + "Storage"))) + struct.pack("<q", len(raw) // dtype.itemsize) + raw
    rows = dump(len(tensors))
    for number, storage, t, offset in tensors:
        rows += dump((number, storage, getattr(torch, kinds[t.dtype] + "Tensor")))
        rows += struct.pack(f"<ii{2 * t.dim() + 1}q", t.dim(), 0, *t.shape, *t.stride(), offset)
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(state)
    members = {"sys_info": dump({"protocol_version": 1000}), "pickle": buffer.getvalue(), "tensors": rows, "storages": stores + dump(parts)}
    with tarfile.open(path, "w:", format=how) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
