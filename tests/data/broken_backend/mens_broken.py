"""mens-numpy with one thing broken at a time, as plugins really get it wrong; ``whole`` is the one that is not."""

import itertools
from pathlib import Path

import attrs
import numpy as np
from mens_numpy import hooks, offer

from mens_core import TrainingState, hookimpl


class Whole:
    """Passes every hook on, under a name of its own."""

    name = "whole"

    @hookimpl
    def mens_plan(self, contract, layout, machine):
        made = offer.mens_plan(contract, layout, machine)
        return attrs.evolve(made, kernel=made.kernel.replace("numpy", self.name))

    @hookimpl
    def mens_open(self, plan):
        return hooks.mens_open(plan)

    @hookimpl
    def mens_forward(self, session, batch):
        return hooks.mens_forward(session, batch)

    @hookimpl
    def mens_loss(self, session, batch):
        return hooks.mens_loss(session, batch)

    @hookimpl
    def mens_step(self, session, window, learning_rate):
        return hooks.mens_step(session, window, learning_rate)

    @hookimpl
    def mens_state(self, session):
        return hooks.mens_state(session)

    @hookimpl
    def mens_restore(self, session, state):
        return hooks.mens_restore(session, state)

    @hookimpl
    def mens_generate(self, session, prompt, settings, on_token):
        return hooks.mens_generate(session, prompt, settings, on_token)

    @hookimpl
    def mens_merge(self, weight, lora_a, lora_b, scale):
        return hooks.mens_merge(weight, lora_a, lora_b, scale)


class WrongShape(Whole):
    """Leaves the last position out, for which there is no target anyway."""

    name = "wrong_shape"

    @hookimpl
    def mens_forward(self, session, batch):
        return hooks.mens_forward(session, batch)[:-1]


class WrongDtype(Whole):
    """Lets a float64 through."""

    name = "wrong_dtype"

    @hookimpl
    def mens_forward(self, session, batch):
        return hooks.mens_forward(session, batch).astype(np.float64)


class NotANumber(Whole):
    """Divides zero by zero in one logit."""

    name = "not_a_number"

    @hookimpl
    def mens_forward(self, session, batch):
        logits = hooks.mens_forward(session, batch)
        logits[-1, -1] = np.nan
        return logits


class LiveBuffers(Whole):
    """Hands out the arrays it trains on."""

    name = "live_buffers"

    @hookimpl
    def mens_state(self, session):
        adapter = {name: parameter.value for name, parameter in session.parameters.items()}
        return attrs.evolve(session.state(), adapter=adapter)


class LiveViews(Whole):
    """Hands out new array objects over the memory it trains on, as a conversion without a copy does."""

    name = "live_views"

    @hookimpl
    def mens_state(self, session):
        adapter = {name: parameter.value[:] for name, parameter in session.parameters.items()}
        return attrs.evolve(session.state(), adapter=adapter)


class RefreshedCopies(Whole):
    """Copies into new arrays, and brings the last of them up to date at every step."""

    name = "refreshed_copies"
    last = None

    @hookimpl
    def mens_state(self, session):
        self.last = hooks.mens_state(session)
        return self.last

    @hookimpl
    def mens_step(self, session, window, learning_rate):
        metrics = hooks.mens_step(session, window, learning_rate)
        for name, array in self.last.adapter.items() if self.last else ():
            array[...] = session.parameters[name].value
        return metrics


class ChangesWeights(Whole):
    """Merges in place."""

    name = "changes_weights"

    @hookimpl
    def mens_merge(self, weight, lora_a, lora_b, scale):
        weight += hooks.mens_merge(weight, lora_a, lora_b, scale) - weight
        return weight


class ChangesBatches(Whole):
    """Writes zeros over the targets that are not supervised."""

    name = "changes_batches"

    @hookimpl
    def mens_step(self, session, window, learning_rate):
        metrics = hooks.mens_step(session, window, learning_rate)
        for batch in window:
            batch.input_ids[batch.targets < 0] = 0
        return metrics


class ChangesBase(Whole):
    """Trains a norm along."""

    name = "changes_base"

    @hookimpl
    def mens_step(self, session, window, learning_rate):
        metrics = hooks.mens_step(session, window, learning_rate)
        norm = next(name for name in session.decoder.base if name.endswith(("ln_f.weight", "model.norm.weight")))
        session.decoder.base[norm][:] *= np.float32(1 - 1e-3 * learning_rate)
        return metrics


class MeanOfMeans(Whole):
    """Divides each batch's gradient by that batch's supervised tokens, and not by the window's."""

    name = "mean_of_means"

    @hookimpl
    def mens_step(self, session, window, learning_rate):
        if len(window) == 1:
            return hooks.mens_step(session, window, learning_rate)
        total = sum(batch.supervised_tokens for batch in window)
        backward = session._backward

        def weighted(place, batch):
            before = [parameter.gradient.copy() for parameter in session.parameters.values()]
            loss = backward(place, batch)
            weight = np.float32(total / batch.supervised_tokens / len(window))
            for parameter, earlier in zip(session.parameters.values(), before, strict=True):
                parameter.gradient[...] = earlier + weight * (parameter.gradient - earlier)
            return loss

        type(session)._backward, kept = (lambda _, place, batch: weighted(place, batch)), type(session)._backward
        try:
            return hooks.mens_step(session, window, learning_rate)
        finally:
            type(session)._backward = kept


class NeverClips(Whole):
    """Opens with a bound that no gradient reaches."""

    name = "never_clips"

    @hookimpl
    def mens_open(self, plan):
        training = attrs.evolve(plan.contract.training, max_grad_norm=1e30)
        return hooks.mens_open(attrs.evolve(plan, contract=attrs.evolve(plan.contract, training=training)))


class CountsInfinite(Whole):
    """Counts a step although it changed nothing."""

    name = "counts_infinite"

    @hookimpl
    def mens_step(self, session, window, learning_rate):
        before = session.taken
        metrics = hooks.mens_step(session, window, learning_rate)
        session.taken = before + 1
        return metrics


class RestoresHalf(Whole):
    """Takes over what fits before it finds what does not."""

    name = "restores_half"

    @hookimpl
    def mens_restore(self, session, state):
        for name, array in state.adapter.items():
            if name in session.parameters and session.parameters[name].value.shape == array.shape:
                session.parameters[name].value[...] = array
        return hooks.mens_restore(session, state)


class KeepsState(Whole):
    """Trains on the arrays of the state that it was given."""

    name = "keeps_state"

    @hookimpl
    def mens_restore(self, session, state):
        hooks.mens_restore(session, state)
        session.moments = dict(state.optimizer)
        return session


class JoinsRows(Whole):
    """Takes a batch for one row, as attention without a mask does."""

    name = "joins_rows"

    @hookimpl
    def mens_forward(self, session, batch):
        joined = attrs.evolve(batch, row_lengths=np.array([len(batch.input_ids)], np.int32))
        return hooks.mens_forward(session, joined)


class WritesFiles(Whole):
    """Leaves a cache in the home directory."""

    name = "writes_files"

    @hookimpl
    def mens_open(self, plan):
        (Path.home() / ".mens_broken").write_text("cache", encoding="utf-8")
        return hooks.mens_open(plan)


class ChangesItsMind(Whole):
    """Offers what happens to be free at the moment."""

    name = "changes_its_mind"
    calls = itertools.count()

    @hookimpl
    def mens_plan(self, contract, layout, machine):
        made = super().mens_plan(contract, layout, machine)
        return attrs.evolve(made, capacity_bytes=1000 + next(self.calls)) if made.feasible else made


class Broadcasts(Whole):
    """Lets NumPy broadcast what does not fit."""

    name = "broadcasts"

    @hookimpl
    def mens_merge(self, weight, lora_a, lora_b, scale):
        return weight + np.float32(scale) * (lora_b @ lora_a)


class TellsTwice(Whole):
    """Tells of the first token when the prompt is read and again in its loop."""

    name = "tells_twice"

    @hookimpl
    def mens_generate(self, session, prompt, settings, on_token):
        tokens = hooks.mens_generate(session, prompt, settings, None)
        if on_token is not None:
            for token in (tokens[0], *tokens):
                on_token(token)
        return tokens


class HalfGradient(Whole):
    """Forgets the scale s in the gradient of B."""

    name = "half_gradient"

    @hookimpl
    def mens_restore(self, session, state):
        # B is held twice as large and the scale half as large: the same function, another gradient.
        session = hooks.mens_restore(session, self._scaled(state, 2.0))
        for linear in session.decoder.linears.values():
            linear.scale = session.plan.contract.adapter.scale / 2
        return session

    @hookimpl
    def mens_state(self, session):
        halved = all(linear.scale != session.plan.contract.adapter.scale for linear in session.decoder.linears.values())
        return self._scaled(hooks.mens_state(session), 0.5 if halved else 1.0)

    @staticmethod
    def _scaled(state: TrainingState, factor: float) -> TrainingState:
        adapter = {
            name: array * np.float32(factor if name.endswith("lora_B.weight") else 1)
            for name, array in state.adapter.items()
        }
        return attrs.evolve(state, adapter=adapter)


class OtherEpsilon(Whole):
    """Takes ten times the epsilon of the norms, which moves logits by some 1e-4."""

    name = "other_epsilon"

    @hookimpl
    def mens_open(self, plan):
        return hooks.mens_open(attrs.evolve(plan, layout=attrs.evolve(plan.layout, norm_eps=10 * plan.layout.norm_eps)))


class ForgetsDecay(Whole):
    """Knows no weight decay."""

    name = "forgets_decay"

    @hookimpl
    def mens_open(self, plan):
        training = attrs.evolve(plan.contract.training, weight_decay=0.0)
        return hooks.mens_open(attrs.evolve(plan, contract=attrs.evolve(plan.contract, training=training)))


class OneRank(Whole):
    """Gives every layer the same rank."""

    name = "one_rank"
    patterns = "rank_pattern"

    @hookimpl
    def mens_open(self, plan):
        adapter = attrs.evolve(plan.contract.adapter, **{self.patterns: ()})
        return hooks.mens_open(attrs.evolve(plan, contract=attrs.evolve(plan.contract, adapter=adapter)))


class OneScale(OneRank):
    """Gives every layer the same alpha."""

    name = "one_scale"
    patterns = "alpha_pattern"


class KeepsBase(Whole):
    """Reads the base's tensors, whatever the plan has whole."""

    name = "keeps_base"

    @hookimpl
    def mens_open(self, plan):
        return hooks.mens_open(attrs.evolve(plan, whole={}))


whole, wrong_shape, wrong_dtype, not_a_number = Whole(), WrongShape(), WrongDtype(), NotANumber()
live_buffers, live_views, refreshed_copies = LiveBuffers(), LiveViews(), RefreshedCopies()
changes_weights, changes_batches, changes_base = ChangesWeights(), ChangesBatches(), ChangesBase()
mean_of_means, never_clips, counts_infinite = MeanOfMeans(), NeverClips(), CountsInfinite()
restores_half, keeps_state, joins_rows, writes_files = RestoresHalf(), KeepsState(), JoinsRows(), WritesFiles()
changes_its_mind, broadcasts, half_gradient = ChangesItsMind(), Broadcasts(), HalfGradient()
tells_twice = TellsTwice()
other_epsilon, forgets_decay = OtherEpsilon(), ForgetsDecay()
one_rank, one_scale, keeps_base = OneRank(), OneScale(), KeepsBase()
