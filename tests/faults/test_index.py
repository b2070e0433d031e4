"""Which test shows that a fault of the list behaves as it should: by its number, here or elsewhere in tests/."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ELSEWHERE = {  # faults that were held before, and are tested where their subject is
    7: ["test_jobs.py::test_a_notebook_runs_headless_with_its_parameters_and_only_once"],
    18: ["test_evaluate.py::test_a_frozen_checkpoint_with_a_changed_byte_is_refused"],
    19: ["test_relay.py::test_metrics_survive_a_torn_last_line"],
    20: ["test_data.py::test_the_hub_cannot_be_reached",
         "faults/test_gate.py::test_47_a_hub_id_goes_through_the_cache_and_its_records_through_the_gate"],
    22: ["test_relay.py::test_files_get_the_mode_of_the_umask"],
    27: ["test_ppo.py::test_equal_scores_give_no_nan_and_almost_no_movement"],
    29: ["test_ppo.py::test_learning_rates_of_0_change_nothing_and_lr_decay_ends_low",
         "test_dpo.py::test_a_learning_rate_of_0_changes_nothing"],
    31: ["test_ppo.py::test_missing_eos_penalty_is_charged_once_and_only_without_eos"],
    32: ["test_data.py::test_an_empty_file_is_refused"],
    33: ["test_sampling.py::test_what_does_not_fit_the_context_is_refused",
         "test_data.py::test_a_prompt_longer_than_the_context_is_refused_when_the_context_is_given"],
    34: ["test_models.py::test_a_model_whose_padding_is_missing_or_eos_gets_another"],
    35: ["test_data.py::test_templates_that_cannot_be_used"],
    37: ["test_sampling.py::test_neither_padding_nor_the_rest_of_the_batch_changes_a_logit",
         "test_reward.py::test_neither_padding_nor_the_batch_changes_a_score"],
    38: ["test_data.py::test_a_pair_is_tokenised_jointly_where_the_border_is_one"],
    39: ["test_sampling.py::test_special_tokens_written_in_a_prompt_stay_text"],
    41: ["test_data.py::test_responses_are_cut_to_the_context_and_pairs_that_become_equal_are_left_out",
         "test_data.py::test_equal_prompts_are_never_on_both_sides"],
    44: ["test_ppo.py::test_epochs_and_minibatches_make_the_steps_they_say"],
    49: ["test_jobs.py::test_bad_parameters_are_refused_before_a_kernel_starts"],
}
NOTHING_TO_BREAK = {6: "there are no sweep workers yet", 53: "neither Ray nor Dask is used"}


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


def by_number() -> dict[int, list[str]]:
    """Number of a fault -> the tests in this folder whose names begin with it."""
    numbered = {}
    for path in Path(__file__).parent.glob("test_*.py"):
        for name in functions_of(path):
            for number in re.findall(r"(?<=_)\d\d(?=b?_)", name) if name.startswith("test_") else ():
                numbered.setdefault(int(number), []).append(name)
    return numbered


@pytest.mark.parametrize("number", range(1, 55))
def test_every_fault_of_the_list_has_a_test_or_nothing_to_break(number):
    places = ELSEWHERE.get(number, [])
    for place in places:
        file, _, name = place.partition("::")
        assert name in functions_of(TESTS / file), place
    assert bool(by_number().get(number) or places) != (number in NOTHING_TO_BREAK)
