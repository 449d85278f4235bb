"""Generation on a fake engine: why it ends, what it says, and that sessions are always given back."""

from __future__ import annotations

import pytest

from flashinfer.errors import FlashInferError, PromptError, StoreError
from flashinfer.text import GenerationDefaults
from tests.generate.fake import ALPHABET, BOS, EOS, LetterTokenizer, fake_model

HELLO = LetterTokenizer().encode("hello")


def test_it_ends_at_the_length_asked_for() -> None:
    model, engine = fake_model("hello ")
    result = model.generate("abc", max_new_tokens=8)
    assert (result.text, result.finish_reason) == ("hello he", "length")
    assert result.prompt_tokens == tuple(LetterTokenizer().encode("abc"))
    assert len(result.tokens) == 8
    assert engine.open_sessions == 0


def test_it_ends_at_eos_which_has_no_text() -> None:
    model, _ = fake_model([*HELLO[1:], EOS])
    result = model.generate("abc")
    assert (result.text, result.finish_reason, result.tokens[-1]) == ("hello", "eos", EOS)


def test_every_eos_id_of_the_defaults_counts() -> None:
    model, _ = fake_model("hello ", defaults=GenerationDefaults(eos_token_id=[0, HELLO[5]]))
    assert model.generate("abc").text == "hell"


def test_it_ends_before_a_stop_string_that_spans_tokens() -> None:
    model, _ = fake_model("hello world. ")
    stream = model.stream("abc", stop=["lo w", "zzz"])
    assert list(stream) == ["h", "e", "l"]
    assert (stream.result.text, stream.result.finish_reason) == ("hel", "stop")


def test_what_was_held_back_for_a_stop_string_comes_at_the_end() -> None:
    model, _ = fake_model("hello ")
    assert model.generate("abc", max_new_tokens=5, stop=["lo there"]).text == "hello"


def test_it_ends_where_the_context_does() -> None:
    model, engine = fake_model("hello ", context=10)
    result = model.generate("abcde")
    assert (len(result.tokens), result.finish_reason) == (4, "context")
    assert engine.open_sessions == 0
    assert model.generate("abcdefgh").finish_reason == "context"


def test_half_a_character_is_never_emitted() -> None:
    model, _ = fake_model("a" + ALPHABET[-1])
    assert list(model.stream("abc", max_new_tokens=4)) == ["a", ALPHABET[-1]]
    assert list(model.stream("abc", max_new_tokens=3)) == ["a", "\ufffd"]


def test_a_prompt_that_does_not_fit_names_both_numbers() -> None:
    model, _ = fake_model("hello ", context=10)
    with pytest.raises(PromptError, match=r"10 tokens.*context of 10.*up to 128"):
        model.generate("abcdefghi")


@pytest.mark.parametrize("prompt", ["", [], [-1], [LetterTokenizer.vocab_size]])
def test_prompts_that_cannot_be(prompt: str | list[int]) -> None:
    model, engine = fake_model("hello ")
    with pytest.raises(PromptError):
        model.stream(prompt)
    assert engine.open_sessions == 0


def test_a_prompt_of_token_ids_is_taken_as_it_is() -> None:
    model, _ = fake_model("hello ")
    assert model.generate([BOS, 5], max_new_tokens=2).prompt_tokens == (BOS, 5)


def test_wrong_parameters_are_refused_at_once() -> None:
    model, _ = fake_model("hello ")
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"stop": [""]}):
        with pytest.raises(ValueError):
            model.stream("abc", **wrong)  # type: ignore[arg-type]


def test_defaults_out_of_range_are_the_stores_fault() -> None:
    for wrong in (GenerationDefaults(temperature=-1.0), GenerationDefaults(do_sample=True, top_p=2.0)):
        with pytest.raises(StoreError, match=r"generation_config\.json"):
            fake_model("hello ", defaults=wrong)


def test_sampling_repeats_with_its_seed() -> None:
    model, _ = fake_model("hello ", defaults=GenerationDefaults(do_sample=True, temperature=2.0))
    assert model.generate("abc", seed=4).tokens == model.generate("abc", seed=4).tokens
    assert model.generate("abc", seed=4).tokens != model.generate("abc", seed=5).tokens
    assert model.generate("abc", temperature=0, max_new_tokens=5).text == "hello"


def test_a_stream_may_be_left_at_any_time() -> None:
    model, engine = fake_model("hello ")
    for _ in model.stream("abc"):
        break
    assert engine.open_sessions == 0
    stream = model.stream("abc")
    assert next(stream) == "h"
    assert engine.open_sessions == 1
    stream.close()
    stream.close()
    assert engine.open_sessions == 0
    assert (stream.result.text, stream.result.finish_reason) == ("h", "cancelled")
    assert model.generate("abc", max_new_tokens=5).text == "hello"


def test_beginning_another_generation_ends_the_stream_before() -> None:
    model, engine = fake_model("hello ")
    first = model.stream("abc")
    next(first)
    second = model.stream("abc", max_new_tokens=5)
    assert engine.open_sessions == 0
    with pytest.raises(FlashInferError, match="began another"):
        next(first)
    assert "".join(second) == "hello"
    model.logits([BOS, 4])
    assert list(second) == []


def test_an_error_in_a_step_gives_the_session_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = fake_model("hello ")

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", fail)
        with pytest.raises(OSError, match="gone"):
            model.generate("abc")
    assert engine.open_sessions == 0
    assert model.generate("abc", max_new_tokens=5).text == "hello"


def test_logits_have_a_row_per_token() -> None:
    model, engine = fake_model("hello ", context=5)
    assert model.logits([BOS, 4, 5]).shape == (3, LetterTokenizer.vocab_size)
    assert engine.open_sessions == 0
    with pytest.raises(PromptError, match="context of 5"):
        model.logits([4] * 6)
    with pytest.raises(PromptError):
        model.logits([])


def test_closing() -> None:
    model, engine = fake_model("hello ")
    with model:
        stream = model.stream("abc")
        next(stream)
    model.close()
    assert engine.closes == 1
    with pytest.raises(FlashInferError, match="closed"):
        next(stream)
    for use in (lambda: model.generate("abc"), lambda: model.logits([BOS])):
        with pytest.raises(FlashInferError, match="closed"):
            use()


def test_timings_count_the_prompt_apart() -> None:
    model, _ = fake_model("hello ")
    one, more = model.generate("abc", max_new_tokens=1).timings, model.generate("abc", max_new_tokens=5).timings
    assert one.first_token > 0
    assert (one.decode, one.decode_tokens_per_second) == (0, 0)
    assert more.decode_tokens_per_second == pytest.approx(4 / more.decode)


def test_a_prompt_that_is_no_text() -> None:
    model, _ = fake_model("hello ")
    with pytest.raises(PromptError, match="Unicode"):
        model.generate("\ud800")
