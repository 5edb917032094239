"""The contract between core and backend as tests, for any backend.

A test module of a backend consists of two things::

    from mens_core.testing.conformance import *

    class Capabilities(BackendCapabilities):
        backend = "mine"
        gpt2 = llama = qwen2 = qwen3 = OPEN
        generate = merge = dropout = patterns = whole = modules_to_save = OPEN
        qlora = closed("no NF4 base yet")
        bfloat16 = closed("computes in float32")

and ``pytest`` does the rest. Each capability is open, which is tested, or closed with a reason, with which its tests
are skipped. What is not declared fails, and so does a capability that is closed and works. The model is SQLAlchemy's
suite for dialects of third parties, ``sqlalchemy.testing.suite``.

Needs pytest and the core, no framework. Numbers are compared with the float64 specification
``mens_core.testing.oracle``. A failure says what broke and quotes the paragraph of ``mens_core.hookspecs``.
"""

from __future__ import annotations

from mens_core.testing.conformance.capabilities import (
    OPEN,
    BackendCapabilities,
    closed,
)
from mens_core.testing.conformance.disk import (
    test_no_hook_writes_to_disk,
)
from mens_core.testing.conformance.dropping import (
    test_another_step_seed_or_place_drops_otherwise,
    test_dropout_of_the_same_state_is_the_same,
    test_only_a_step_drops,
    test_what_is_dropped_is_made_up_for,
)
from mens_core.testing.conformance.forward import (
    test_a_fresh_adapter_is_exactly_the_identity,
    test_a_loss_is_that_of_the_specification,
    test_a_row_does_not_feel_the_other_rows,
    test_logits_are_those_of_the_specification,
    test_logits_in_bfloat16_are_near_the_specification,
    test_no_position_sees_what_comes_later,
    test_nothing_supervised_costs_nothing,
    test_qlora_has_the_nf4_base_of_the_specification,
    test_the_same_batch_gives_the_same_bits,
)
from mens_core.testing.conformance.generating import (
    test_a_stop_token_ends_the_answer_and_is_in_it,
    test_every_token_is_the_likeliest_of_forward,
    test_training_goes_on_after_an_answer_as_if_there_was_none,
    test_who_listens_is_told_every_token_in_order,
)
from mens_core.testing.conformance.offers import (
    test_a_capability_is_what_it_is_declared_to_be,
    test_an_offer_needs_no_weights,
    test_every_hook_of_a_run_is_implemented,
    test_the_same_question_gets_the_same_offer,
)
from mens_core.testing.conformance.opening import (
    test_files_in_bfloat16_are_read_exactly,
    test_weights_that_do_not_fit_are_refused_by_name,
)
from mens_core.testing.conformance.patterned import (
    test_layers_have_ranks_of_their_own,
    test_layers_have_scales_of_their_own,
)
from mens_core.testing.conformance.replacing import (
    test_what_a_plan_has_whole_takes_the_places_of_the_base,
)
from mens_core.testing.conformance.saving import (
    test_gradients_of_modules_trained_whole_are_those_of_the_specification,
    test_modules_trained_whole_come_out_and_go_in_bit_for_bit,
    test_modules_trained_whole_start_as_the_base_has_them,
)
from mens_core.testing.conformance.state import (
    test_a_copy_stays_as_it_was,
    test_a_resumed_run_is_the_uninterrupted_one,
    test_a_state_that_does_not_fit_is_refused_and_nothing_changes,
    test_fresh_moments_come_out_as_none,
    test_names_and_shapes_of_an_adapter_are_shared,
    test_what_was_given_is_not_kept,
    test_what_was_restored_comes_out_bit_for_bit,
)
from mens_core.testing.conformance.step import (
    test_a_batch_without_targets_adds_nothing,
    test_a_step_that_is_not_finite_changes_nothing,
    test_clipping_really_clips,
    test_gradients_are_those_of_the_specification,
    test_qlora_gradients_are_those_of_the_specification,
    test_rate_zero_moves_the_moments_only,
    test_something_is_learned,
    test_the_base_never_changes,
    test_the_cut_of_a_window_does_not_matter,
    test_the_update_is_adamw,
)
from mens_core.testing.conformance.weights import (
    test_a_merge_is_that_of_the_specification,
    test_a_merge_of_what_does_not_fit_is_refused,
    test_a_weight_that_is_not_finite_is_not_quantised,
    test_nf4_comes_back_as_the_specification_says,
    test_nf4_is_byte_for_byte_that_of_the_specification,
)
from mens_core.testing.conformance.whole import (
    test_the_suite_is_whole,
)
from mens_core.testing.conformance.workbench import (
    family,
    workbench,
)

__all__ = [
    "OPEN",
    "BackendCapabilities",
    "closed",
    "family",
    "test_a_batch_without_targets_adds_nothing",
    "test_a_capability_is_what_it_is_declared_to_be",
    "test_a_copy_stays_as_it_was",
    "test_a_fresh_adapter_is_exactly_the_identity",
    "test_a_loss_is_that_of_the_specification",
    "test_a_merge_is_that_of_the_specification",
    "test_a_merge_of_what_does_not_fit_is_refused",
    "test_a_resumed_run_is_the_uninterrupted_one",
    "test_a_row_does_not_feel_the_other_rows",
    "test_a_state_that_does_not_fit_is_refused_and_nothing_changes",
    "test_a_step_that_is_not_finite_changes_nothing",
    "test_a_stop_token_ends_the_answer_and_is_in_it",
    "test_a_weight_that_is_not_finite_is_not_quantised",
    "test_an_offer_needs_no_weights",
    "test_another_step_seed_or_place_drops_otherwise",
    "test_clipping_really_clips",
    "test_dropout_of_the_same_state_is_the_same",
    "test_every_hook_of_a_run_is_implemented",
    "test_every_token_is_the_likeliest_of_forward",
    "test_files_in_bfloat16_are_read_exactly",
    "test_fresh_moments_come_out_as_none",
    "test_gradients_are_those_of_the_specification",
    "test_gradients_of_modules_trained_whole_are_those_of_the_specification",
    "test_layers_have_ranks_of_their_own",
    "test_layers_have_scales_of_their_own",
    "test_logits_are_those_of_the_specification",
    "test_logits_in_bfloat16_are_near_the_specification",
    "test_modules_trained_whole_come_out_and_go_in_bit_for_bit",
    "test_modules_trained_whole_start_as_the_base_has_them",
    "test_names_and_shapes_of_an_adapter_are_shared",
    "test_nf4_comes_back_as_the_specification_says",
    "test_nf4_is_byte_for_byte_that_of_the_specification",
    "test_no_hook_writes_to_disk",
    "test_no_position_sees_what_comes_later",
    "test_nothing_supervised_costs_nothing",
    "test_only_a_step_drops",
    "test_qlora_gradients_are_those_of_the_specification",
    "test_qlora_has_the_nf4_base_of_the_specification",
    "test_rate_zero_moves_the_moments_only",
    "test_something_is_learned",
    "test_the_base_never_changes",
    "test_the_cut_of_a_window_does_not_matter",
    "test_the_same_batch_gives_the_same_bits",
    "test_the_same_question_gets_the_same_offer",
    "test_the_suite_is_whole",
    "test_the_update_is_adamw",
    "test_training_goes_on_after_an_answer_as_if_there_was_none",
    "test_weights_that_do_not_fit_are_refused_by_name",
    "test_what_a_plan_has_whole_takes_the_places_of_the_base",
    "test_what_is_dropped_is_made_up_for",
    "test_what_was_given_is_not_kept",
    "test_what_was_restored_comes_out_bit_for_bit",
    "test_who_listens_is_told_every_token_in_order",
    "workbench",
]
