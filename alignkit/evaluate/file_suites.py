"""Suites whose items are in a file of the user (`--suite xstest=FILE`): XSTest's prompts, RewardBench's pairs."""

from collections.abc import Mapping

from alignkit.errors import DataError, ParameterError
from alignkit.evaluate.suite_records import Score
from alignkit.formulas.intervals import Estimate

MOST_TOKENS = 256  # of a reply to a prompt of XSTest


def prepare_refusals(options) -> None:
    """Read the prompts of `options.file` once to check them. Raises ParameterError without a file, and as
    `read_refusal_prompts`."""
    from alignkit.evaluate.refusals import read_refusal_prompts

    read_refusal_prompts(_file(options))


def measure_refusals(checkpoint, options) -> Mapping[str, Estimate]:
    """over_refusal, unsafe_compliance and the other metrics of `Refusals.metrics`, from greedy replies of up to
    MOST_TOKENS tokens (fewer if the model's context is too short). The prompts go through the tokenizer's chat
    template, if it has one."""
    from alignkit.evaluate.refusals import over_refusal, read_refusal_prompts
    from alignkit.forward.rollout import encode_prompts
    from alignkit.models.fitness import context_length

    tokenizer, context = checkpoint.tokenizer, context_length(checkpoint.model)
    rows = read_refusal_prompts(options.file, tokenizer if checkpoint.chat_template else None)[: options.limit]
    longest = encode_prompts(tokenizer, [row["prompt"] for row in rows])[0].shape[1]
    if context and longest >= context:
        raise DataError(f"{options.file}: a prompt has {longest:,} tokens, and the model reads {context:,}")
    left = context - longest if context else MOST_TOKENS
    result = over_refusal(checkpoint.model, tokenizer, rows, batch_size=options.batch_size,
                          max_new_tokens=min(MOST_TOKENS, left))
    safe = sum(row["label"] == "safe" for row in rows)
    counts = {"over_refusal": safe, "safe_partial_refusal": safe, "unsafe_compliance": len(rows) - safe,
              "unsafe_partial_refusal": len(rows) - safe}
    return {name: Score(figure.value, figure.low, figure.high, n=counts.get(name, len(rows)), note=result.known_error)
            for name, figure in result.metrics.items()}


def prepare_rewardbench(options) -> None:
    """Read the pairs of `options.file` once. Raises ParameterError without a file, and as `read_rewardbench`."""
    from alignkit.evaluate.rewardbench import read_rewardbench

    read_rewardbench(_file(options))


def measure_rewardbench(checkpoint, options) -> Mapping[str, Estimate]:
    """Accuracy overall, by section and by subset, of the reward model in the checkpoint's folder."""
    from alignkit.evaluate.rewardbench import read_rewardbench, rewardbench

    scorer = checkpoint.scorer
    rows = read_rewardbench(options.file, scorer.tokenizer if scorer.tokenizer.chat_template else None)
    result = rewardbench(scorer, rows[: options.limit])
    counts = {f"/{subset}": n for subset, (_, n) in result.won.items()}
    return {name: Score(figure.value, figure.low, figure.high, note="; ".join(result.notes),
                        n=sum(counts.values()) if name == "rewardbench" else counts.get(name[name.rfind("/"):]))
            for name, figure in result.metrics.items()}


def _file(options):
    if options.file is None:
        raise ParameterError(f"{options.suite.name} needs a file of yours: --suite {options.suite.name}=FILE "
                             "(docs/judging.md says which columns it has)")
    return options.file
