"""From a checkpoint to text, with the real engine: the tokens transformers generates."""

from __future__ import annotations

from pathlib import Path

import pytest

import flashinfer
from flashinfer.errors import PromptError
from tests.checkpoints import make_llama
from tests.tiny_tokenizers import tiny_sentencepiece


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_llama(tmp_path_factory.mktemp("end") / "checkpoint", vocab_size=330)
    tiny_sentencepiece(folder)
    return folder


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> Path:
    path = checkpoint.parent / "model.flash"
    flashinfer.pack(checkpoint, path)
    return path


def test_greedy_tokens_are_those_of_transformers(checkpoint: Path, store: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(checkpoint)
    with flashinfer.load(store, weight_memory="2MiB") as model:
        for prompt in ("The dog", "Once upon a time there was"):
            ours = model.generate(prompt, max_new_tokens=12, repetition_penalty=1.3)
            ids = torch.tensor([ours.prompt_tokens])
            expected = theirs.generate(
                ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.3, attention_mask=torch.ones_like(ids)
            )
            assert list(ours.prompt_tokens + ours.tokens) == expected[0].tolist()
            assert model.tokenizer.decode(ours.prompt_tokens) == prompt


def test_a_stream_left_early_leaves_the_model_as_it_was(store: Path) -> None:
    with flashinfer.load(store, weight_memory="2MiB", context=32) as model:
        whole = model.generate("The dog", max_new_tokens=10)
        next(iter(model.stream("The cat ran", max_new_tokens=10)))
        assert model.generate("The dog", max_new_tokens=10).tokens == whole.tokens
        assert "".join(model.stream("The dog", max_new_tokens=10)) == whole.text
        assert model.plan.context == 32
        with pytest.raises(PromptError, match="context of 32"):
            model.generate("The dog ran to the park, and the cat ran after the dog! " * 5)


def test_wrong_arguments_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    for wrong in (
        {"window": -1}, {"threads": -1}, {"io_objective": "luck"}, {"context": 0}, {"memory": "much"},
        {"memory": 1, "weight_memory": 1},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            flashinfer.load(tmp_path / "no such store", **wrong)  # type: ignore[arg-type]
