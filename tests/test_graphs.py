"""The step that a GPU captures: run uncaptured here, and tried for what a capture forbids with tensors that are fake.

No test here has run on a GPU: `python -m benchmarks.gpu` makes the same comparisons there, and stops if one fails.
"""

import warnings
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from transformers.initialization import no_init_weights

from alignkit.errors import NonFinite
from alignkit.formulas.randomness import seeded
from alignkit.forward import cpu, cuda_graph
from alignkit.forward.known import rotation_order
from alignkit.forward.rollout import left_pad
from alignkit.forward.sampling import sample
from alignkit.models.adapters import add_lora
from alignkit.models.loading import load_policy
from tests.test_fast import MODELS, PROMPTS, made

NAMES = ("response_ids", "response_mask", "logprobs", "finished")


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    """No model has been tried yet."""
    monkeypatch.setattr(cuda_graph, "_agreed", weakref.WeakKeyDictionary())


def drawn(model, *, prompts=PROMPTS, eos=2, tokens=20, temperature=1.0, generator=None):
    ids, mask = left_pad(prompts, 0)
    return sample(model, ids, mask, max_new_tokens=tokens, eos_token_id=eos, pad_token_id=0,
                  generator=generator or seeded(4), temperature=temperature)


def by_graph(monkeypatch):
    """From here on a CPU is taken for a GPU: which steps are made, by how many rows."""
    steps, step = [], cuda_graph.Decoder.step
    monkeypatch.setattr(cuda_graph, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_graph.Decoder, "step", lambda self: (steps.append(self.rows), step(self))[1])
    return steps


@pytest.mark.parametrize("temperature", [1e-5, 0.7, 1.0])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_the_generic_loop(name, temperature, monkeypatch):
    """Ragged prompts, some twice; a frequent token as EOS, so that rows end at different places."""
    model, prompts = made(name), PROMPTS * 3
    eos = int(drawn(model, prompts=prompts, eos=-1, temperature=temperature).response_ids.flatten().mode().values)
    generators = [seeded(4) for _ in range(3)]
    fast_drawn = drawn(model, prompts=prompts, eos=eos, temperature=temperature, generator=generators[0])
    monkeypatch.setattr(cpu, "reader", lambda model: None)
    generic = drawn(model, prompts=prompts, eos=eos, temperature=temperature, generator=generators[1])
    steps = by_graph(monkeypatch)
    static = drawn(model, prompts=prompts, eos=eos, temperature=temperature, generator=generators[2])
    assert len(prompts) in steps and generic.finished.any()
    for expected in (generic, fast_drawn):
        for what in NAMES:
            mine, theirs = getattr(static, what), getattr(expected, what)
            if what == "logprobs":  # in float32 a logit over 1e-5 is rounded to 1e-2
                assert torch.allclose(mine, theirs, atol=1e-5 / min(temperature, 1.0), rtol=0)
            else:
                assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), what
    numbers = [torch.rand(1, generator=generator) for generator in generators]
    assert numbers[0] == numbers[1] == numbers[2]  # what is drawn next is the same too


def test_when_every_row_has_ended_the_host_notices_and_the_columns_left_are_not_returned(monkeypatch):
    model = made("llama")
    eos = int(drawn(model, eos=-1, temperature=1e-5).response_ids[0, 2])
    expected = drawn(model, prompts=[PROMPTS[0]] * 3, eos=eos, tokens=50, temperature=1e-5)
    steps = by_graph(monkeypatch)
    assert cuda_graph.usable(model, 50)
    steps.clear()
    found = drawn(model, prompts=[PROMPTS[0]] * 3, eos=eos, tokens=50, temperature=1e-5)
    assert len(steps) == cuda_graph.CHECK and expected.response_ids.shape[1] <= 3
    assert torch.equal(found.response_ids, expected.response_ids) and found.finished.all()


def test_a_prompt_that_occurs_several_times_is_read_once(monkeypatch):
    model, read = made("qwen2"), []
    by_graph(monkeypatch)
    assert cuda_graph.usable(model, 20)
    forward = type(model).forward

    def counted(self, *args, **options):
        read.append(len(options["input_ids"]))
        return forward(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", counted)
    drawn(model, prompts=[prompt for prompt in PROMPTS for _ in range(4)])
    assert read == [len(PROMPTS)]


def test_a_step_of_the_optimiser_is_seen(monkeypatch):
    model = made("qwen2")
    by_graph(monkeypatch)
    before = drawn(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    after = drawn(model)
    monkeypatch.setattr(cuda_graph, "DEVICE", "cuda")
    assert torch.equal(after.response_ids, drawn(model).response_ids)
    assert not torch.equal(after.logprobs[:, 0], before.logprobs[:, 0])


def test_nan_is_refused(monkeypatch):
    model = made("llama")
    by_graph(monkeypatch)
    assert cuda_graph.usable(model, 20)
    with torch.no_grad():
        model.model.embed_tokens.weight[9:] = torch.nan
    with pytest.raises(NonFinite, match="logits are NaN or infinite"):
        drawn(model, prompts=[[9, 9]], tokens=40)


# What a capture forbids.


@pytest.fixture
def fake(monkeypatch):
    """Tensors on a GPU that does not exist: shapes, dtypes and devices are right, numbers there are none."""
    for module in (nn.Linear, nn.Embedding):
        monkeypatch.setattr(module, "reset_parameters", lambda self: None)
    monkeypatch.setattr(cpu.Reader, "rope", lambda self, length: torch.zeros(  # the model's own indexes with None
        length, self.width // 2, dtype=torch.complex64, device="cuda"))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: self.zero_().add_(other))  # needs a real one too
    rotation_order.cache_clear()
    with FakeTensorMode() as mode:
        yield mode
    rotation_order.cache_clear()


@pytest.mark.parametrize("name", MODELS)
def test_no_operation_of_a_step_waits_for_the_device_or_reads_the_host(name, fake):
    """.item(), nonzero, `if tensor` and a tensor of the CPU among those of the GPU all raise with fake tensors."""
    with torch.device("cuda"), no_init_weights():
        model = MODELS[name]().eval()
    decoder = cuda_graph.Decoder(model, 5, 7, 20, eos_token_id=2, pad_token_id=0, temperature=0.7)
    kept = {key: value for key, value in vars(decoder).items() if isinstance(value, torch.Tensor)}
    assert {value.device.type for value in [*kept.values(), *decoder.cache]} == {"cuda"}
    assert decoder.cache[0].dtype == decoder.layers[0].qkv[0].dtype == decoder.head[0].dtype == torch.bfloat16
    for _ in range(2):
        decoder.step()
    for key, value in kept.items():  # a replay reads and writes the memory that was captured
        assert getattr(decoder, key) is value, key


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (lambda self: self.alive.any().item(), DataDependentOutputException),
        (lambda self: self.alive.nonzero(), Exception),
        (lambda self: self.logits.add_(torch.zeros(5, 1)), FakeTensorDeviceMismatchError),
    ],
    ids=["a number read back", "a shape that depends on numbers", "a tensor on the CPU"],
)
def test_fake_tensors_do_notice_it(broken, error, fake, monkeypatch):
    draw = cuda_graph.Decoder._draw
    monkeypatch.setattr(cuda_graph.Decoder, "_draw", lambda self: (draw(self), broken(self))[0])
    with torch.device("cuda"), no_init_weights():
        model = MODELS["qwen2"]().eval()
    decoder = cuda_graph.Decoder(model, 5, 7, 20, eos_token_id=2, pad_token_id=0)
    with pytest.raises(error):
        decoder.step()


# What is left to the generic loop.


@pytest.mark.parametrize(
    "other",
    [
        lambda: load_policy("tiny", device="cpu")[0].double(),
        lambda: add_lora(made("qwen2")),
        lambda: add_lora(made("qwen2")).get_base_model(),
    ],
    ids=["float64", "lora", "inside lora"],
)
def test_what_is_more_than_the_plain_model_is_left_to_the_generic_loop(other, monkeypatch):
    steps = by_graph(monkeypatch)
    assert not cuda_graph.usable(other(), 100) and not steps


def test_short_responses_and_a_cpu_are_left_to_the_generic_loop(monkeypatch):
    model = made("phi")
    assert not cuda_graph.usable(model, 100)
    by_graph(monkeypatch)
    assert not cuda_graph.usable(model, cuda_graph.SHORTEST - 1) and cuda_graph.usable(model, cuda_graph.SHORTEST)


def fails(self):
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize(
    ("name", "broken", "message"),
    [("_norm", lambda x, module: x, "off by"), ("Decoder.step", fails, "not permitted when stream is capturing$")],
)
def test_a_decoder_that_disagrees_or_fails_is_not_used_and_says_so_once(name, broken, message, monkeypatch):
    model = made("llama")
    expected = drawn(model)
    monkeypatch.setattr(cuda_graph, "DEVICE", "cpu")
    owner = cuda_graph.Decoder if "." in name else cuda_graph
    monkeypatch.setattr(owner, name.split(".")[-1], broken)
    with pytest.warns(UserWarning, match=f"LlamaForCausalLM is sampled without a CUDA graph: .*{message}"):
        found = drawn(model)
    assert torch.equal(found.response_ids, expected.response_ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(model)


@pytest.mark.parametrize("change", ["place", "position", "turn"])
def test_the_check_notices_a_counter_that_stands_still(change, monkeypatch):
    model, read = made("qwen2"), cuda_graph.Decoder._read
    assert cuda_graph._error(model) < 1e-5
    monkeypatch.setattr(
        cuda_graph.Decoder, "_read", lambda self, token: (read(self, token), getattr(self, change).sub_(1))[0]
    )
    assert cuda_graph._error(model) > 0.05


@pytest.mark.parametrize("name", ["llama, two heads a key", "qwen2", "phi"])
def test_in_bf16_it_is_as_near_to_the_model_as_bf16_is(name):
    model = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        error = cuda_graph._error(model)
    assert 1e-4 < error < cuda_graph.TOLERANCE[torch.bfloat16]
