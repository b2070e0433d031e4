"""Per-token tensors and KL estimators against slow float64 references and enumeration."""

import math

import pytest
import torch

from alignkit.formulas.kl import exact_kl, k1, k2, k3
from alignkit.formulas.tokens import entropy, masked_mean, sequence_logps, token_logprobs, whiten

MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


def slow_logprob(row, token):
    largest = max(row)
    return row[token] - largest - math.log(sum(math.exp(x - largest) for x in row))


def test_token_logprobs_equal_a_slow_reference():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)) * 3
    tokens = torch.tensor([[0, 4, 2], [1, 1, 3]])
    result = token_logprobs(logits, tokens)
    for b in range(2):
        for t in range(3):
            assert float(result[b, t]) == pytest.approx(
                slow_logprob(logits[b, t].double().tolist(), int(tokens[b, t])), abs=1e-6
            )


def test_token_logprobs_names_the_shape_that_does_not_fit():
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 4\), expected \(2, 3\)"):
        token_logprobs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize("never", [-1e4, -math.inf])
def test_entropy_of_a_uniform_choice_is_log_n_also_with_impossible_tokens(never):
    logits = torch.tensor([0.0, 0.0, 0.0, never])
    assert float(entropy(logits)) == pytest.approx(math.log(3), abs=1e-6)
    assert float(entropy(torch.tensor([0.0, never]))) == 0.0


def test_what_lies_outside_the_mask_never_counts():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, math.nan, math.inf], [math.nan] * 3])
    assert float(masked_mean(values, MASK)) == 2.5
    assert masked_mean(values, MASK, dim=1).tolist() == [2.0, 4.0, 0.0]
    assert sequence_logps(values, MASK).tolist() == [6.0, 4.0, 0.0]
    assert torch.isfinite(whiten(values, MASK)).all()


def test_whitened_values_have_mean_0_and_variance_1():
    values = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)) * 7 + 5
    white = whiten(values, MASK)
    assert float(masked_mean(white, MASK)) == pytest.approx(0, abs=1e-6)
    assert float(masked_mean(white.square(), MASK)) == pytest.approx(1, abs=1e-4)
    assert white[~MASK].tolist() == [0.0] * 5
    kept = whiten(values, MASK, shift_mean=False)
    assert float(masked_mean(kept, MASK)) == pytest.approx(float(masked_mean(values, MASK)), rel=1e-5)


def test_whitening_equal_values_or_one_value_gives_0():
    assert whiten(torch.full((3, 3), 4.2), MASK).abs().max() < 1e-3
    assert whiten(torch.tensor([[7.0]]), torch.tensor([[True]])).tolist() == [[0.0]]


def distributions():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.5, 0.1], dtype=torch.float64)
    return p, q, float((p * (p / q).log()).sum()), float((q * (q / p).log()).sum())


def test_k1_and_k3_are_unbiased_for_samples_of_the_first_argument_and_k2_is_not():
    p, q, kl, reverse = distributions()
    for estimator in (k1, k3):
        assert float((p * estimator(p.log(), q.log())).sum()) == pytest.approx(kl, abs=1e-12)
        # sampled from the other policy they estimate something else: naming the sampler matters
        assert abs(float((q * estimator(p.log(), q.log())).sum()) - kl) > 0.05
    assert float((q * k1(q.log(), p.log())).sum()) == pytest.approx(reverse, abs=1e-12)
    assert abs(float((p * k2(p.log(), q.log())).sum()) - kl) > 0.005


def test_k2_is_half_the_squared_log_ratio_and_k1_can_be_negative():
    logprobs, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -0.5])
    assert k1(logprobs, ref).tolist() == [1.0, -1.5]
    assert k2(logprobs, ref).tolist() == [0.5, 1.125]


def test_k3_is_never_negative_not_even_where_float32_rounds():
    base = torch.zeros(1000)
    near = base + torch.linspace(-1e-5, 1e-5, 1000)
    assert (k3(near, base) >= 0).all() and (k3(base, near) >= 0).all()
    naive = torch.exp(base - near) - 1 - (base - near)
    assert (naive < 0).any()  # what expm1 is there for


def test_exact_kl_equals_the_sum_and_is_not_symmetric():
    p, q, kl, reverse = distributions()
    assert float(exact_kl(p.log().float(), q.log().float())) == pytest.approx(kl, abs=1e-6)
    assert float(exact_kl(q.log().float(), p.log().float())) == pytest.approx(reverse, abs=1e-6)
    impossible = torch.tensor([0.0, 0.0, -1e4])
    assert float(exact_kl(impossible, impossible)) == pytest.approx(0, abs=1e-6)
