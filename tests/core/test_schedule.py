"""The learning rate is transformers' schedule of the same name, at every step."""

import pytest

from mens_core.training.schedule import learning_rate, warmup_for

TOTAL = 37


@pytest.mark.parametrize("warmup", [0, 1, 5, TOTAL])
@pytest.mark.parametrize(
    ("name", "reference"),
    [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")],
)
def test_the_schedule_equals_transformers_at_every_step(name, reference, warmup):
    import torch
    from transformers import get_scheduler

    peak = 2e-4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = get_scheduler(reference, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL)
    for step in range(TOTAL):
        ours = learning_rate(step, schedule=name, peak=peak, warmup_steps=warmup, total_steps=TOTAL)
        # The same formula in double precision: a few roundings of a number below 1e-3.
        assert ours == pytest.approx(scheduler.get_last_lr()[0], abs=1e-18, rel=1e-14)
        optimizer.step()
        scheduler.step()


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="polynomial"):
        learning_rate(3, schedule="polynomial", peak=1.0, warmup_steps=0, total_steps=5)


@pytest.mark.parametrize(("total", "asked", "expected"), [(10, None, 0), (1000, None, 30), (10, 50, 10), (10, 0, 0)])
def test_warmup_is_a_share_of_the_run_unless_asked_for(total, asked, expected):
    assert warmup_for(total, asked) == expected


@pytest.mark.parametrize("warmup", [0, 1, 5, TOTAL - 1])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_schedule_is_optaxs_and_the_specifications(name, warmup):
    import optax

    from mens_core.testing.oracle import scheduled_rate

    peak, rest = 0.5, TOTAL - warmup
    fall = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[name]
    reference = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), fall], [warmup]) if warmup else fall
    for step in range(TOTAL):
        settings = {"schedule": name, "peak": peak, "warmup_steps": warmup, "total_steps": TOTAL}
        ours = learning_rate(step, **settings)
        assert ours == pytest.approx(float(reference(step)), abs=peak * 5e-7)  # a few roundings of optax's float32
        assert ours == pytest.approx(scheduled_rate(step, **settings), abs=1e-15)
