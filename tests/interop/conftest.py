"""What the tests share: the program, and one small GPT-2 of PyTorch's, saved three ways."""
import os, types

import pytest
import torch
from safetensors.torch import save_file

import gpt2_torch
from unladen_cli import UNLADEN

TOKENS = [1, 2, 3, 50256, 0, 777]


def pytest_configure():
    torch.set_num_threads(2)
    if not os.access(UNLADEN, os.X_OK):
        pytest.exit(f"no program at {UNLADEN}: run `cargo build -p unladen-cli`, or say in UNLADEN where it is", returncode=2)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """gpt2-tiny as PyTorch makes it: the model, its state dict, its three files, and its logits for TOKENS."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(123)
    model = gpt2_torch.GPTModel(gpt2_torch.config("tiny")).eval()
    state = model.state_dict()
    torch.save(state, folder / "gpt2-tiny.pth")
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "gpt2-tiny.safetensors")
    (folder / "gpt2-tiny-params").mkdir()
    for name, t in state.items(): torch.save(t.clone(), folder / f"gpt2-tiny-params/{name}.pt")
    with torch.no_grad(): logits = model(torch.tensor([TOKENS]))[0]
    files = {"pth": folder / "gpt2-tiny.pth", "safetensors": folder / "gpt2-tiny.safetensors", "params": folder / "gpt2-tiny-params"}
    return types.SimpleNamespace(model=model, state=state, logits=logits, tokens=TOKENS, **files)
