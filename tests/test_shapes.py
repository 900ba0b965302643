"""What a wrong type or shape is called, in one line that a student can act on."""

import pytest
import torch

import tl_melbo as tm


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda f: tm.melbo(f, radius="12"),
            r"melbo\(\): argument 'radius' is '12' \(str\), expected",
        ),
        (
            lambda f: tm.melbo(f.model),
            r"argument 'f' is a model, expected an activation map; make one: .*from_prompts",
        ),
        (
            lambda f: tm.melbo(f, optimiser="adam"),
            r"'adam' \(str\), expected 'ascent', 'adamw'; did you mean 'adamw'\?",
        ),
        (lambda f: tm.melbo(f, positions=5), r"argument 'positions' is 5 \(int\), expected slice"),
        (
            lambda f: f.delta(torch.zeros(32)),
            r"'theta' is a tensor float32\[32\], expected Float\[Tensor, 'vector d_model'\]",
        ),
        (
            lambda f: tm.melbo(f, n_vec=3),
            r"melbo\(\): got an unexpected keyword argument 'n_vec'; did you mean 'n_vectors'\?",
        ),
        (lambda f: tm.melbo_ortho(f), r"melbo_ortho\(\): missing a required argument: 'theta0'"),
        (lambda f: tm.generate("Hi!", f.model), r"generate\(\): argument '"),
        (
            lambda f: tm.generate(f.model, ["Hi!", *["Bye."] * 50, 3]),
            r"generate\(\): prompts\[51\] is 3 \(int\), expected str",
        ),
        (
            lambda f: tm.generate(f.model, "Hi!", scales=[1.0, 2, True]),
            r"generate\(\): scales\[2\] is True \(bool\), expected float",
        ),
        (
            lambda f: tm.Run("nowhere").texts(f.model, max_new_tokens="a"),
            r"^Run\.texts\(\): argument 'max_new_tokens' is 'a' \(str\), expected int",
        ),
        (
            lambda f: tm.Run("nowhere").factor_texts(f.model, 3, "Hi!"),
            r"^Run\.adapter_texts or factor_texts\(\): argument 'steering' is 3",
        ),
    ],
)
def test_one_line_says_what_came_and_what_is_allowed(tiny_llama, call, message):
    f = tm.ActivationMap.from_prompts(tiny_llama, "Hello there!", 1, 4)
    with pytest.raises(TypeError, match=message) as caught:
        call(f)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_numbers(tiny_llama):
    f = tm.ActivationMap.from_prompts(tiny_llama, "Hello there!", 1, 4)
    assert float(tm.melbo(f, 1, 2, steps=1).norms[0]) == pytest.approx(2.0)
