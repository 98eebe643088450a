"""What people do to a model, in any order: where heads went, its folder gives it back, or saving it is refused.

`make fuzz` tries many more orders than the suite does, and others each time.
"""

import copy
import os
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import AutoModel

import secateur
from secateur.errors import SecateurError
from secateur.exporting.export import export_standalone
from secateur.models.inputs import example_inputs
from secateur.removal.checkpoint import without_hook
from secateur.removal.proof import hidden_states
from secateur.removal.remove import remove_
from secateur.removal.verify import verify_checkpoint
from secateur.scorers.score import score
from secateur.settings import Cut, Reading
from secateur.units.select import select
from tests.support.tiny import ADAPTED, LAYERS, tiny_model, tiny_texts, tiny_tokenizer

ROUNDED = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}


KINDS = st.sampled_from(["heads", "heads", "neurons", "layers"])
TEXTS = tiny_texts(24)
CASES = int(os.environ.get("FUZZ_CASES", 500))
ORDERS = settings(
    max_examples=CASES // 55,
    stateful_step_count=12,
    derandomize=CASES <= 2000,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
came: Counter[str] = Counter()


class Workflow(RuleBasedStateMachine):
    """One model; `adapted` is what PEFT made of it, while an adapter is there.

    `dense` is the model as it was first, `is_own` whether secateur alone has changed it, and `left` how many of the
    slower things may still be done with it.
    """

    @initialize(kind=st.sampled_from(sorted(ADAPTED)))
    def start(self, kind):
        self.kind, self.model, self.adapted = kind, tiny_model(kind), None
        self.dense, self.is_own, self.left = copy.deepcopy(self.model), True, 2

    @rule(seed=st.integers(0, 99), ratio=st.sampled_from([0.2, 0.5]), units=KINDS)
    def prune(self, seed, ratio, units):
        with suppress(SecateurError):  # what cannot be pruned is as it was
            remove_(self.model, self.chosen(seed, ratio, units))

    def chosen(self, seed, ratio, units):
        scores = score(self.model, scorer="random", units=[units], reading=Reading(seed=seed))
        return select(scores, ratio, "uniform" if units == "heads" else "ranking", 0 if units == "neurons" else 1)

    @invariant()
    def what_is_cut_after_a_plain_cut_counts_from_there(self):
        if hasattr(self, "model") and getattr(self.model.config, "pruned_from", None) is not None:
            self.is_own = False

    def can_do_more(self):
        return self.adapted is None and self.left > 0

    @precondition(can_do_more)
    @rule(seed=st.integers(0, 99), units=KINDS)
    def prune_plainly(self, seed, units):
        """A folder that says all by its own numbers loads where secateur is not."""
        self.left -= 1
        cut, reading = Cut(pruning_ratio=0.5, units=[units], plain=True), Reading(seed=seed)
        try:
            model, _ = secateur.prune(
                self.model,
                TEXTS[:8],
                scorer="random",
                restore="none",
                tokenizer=tiny_tokenizer(),
                cut=cut,
                reading=reading,
            )
        except SecateurError:
            return
        self.model = model
        if getattr(model.config, "head_pruning", None) is None:
            came["plain"] += 1
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                with without_hook():
                    self.compare(AutoModel.from_pretrained(folder, dtype="auto").eval())

    @precondition(can_do_more)
    @rule(seed=st.integers(0, 99), units=st.sampled_from(["heads", "neurons"]))
    def refit_and_prune(self, seed, units):
        self.left, was_own = self.left - 1, self.is_own
        with suppress(SecateurError):
            mask = self.chosen(seed, 0.5, units)
            before, after = secateur.reconstruct_(self.model, mask, TEXTS, tiny_tokenizer())
            self.is_own = self.is_own and after == before  # until it is removed, which says so
            remove_(self.model, mask, record={"reconstructed": True} if after < before else None)
            self.is_own = was_own
            came["refitted"] += 1

    @precondition(can_do_more)
    @rule()
    def teach(self):
        self.left -= 1
        with suppress(SecateurError):
            secateur.distill_(self.model, copy.deepcopy(self.dense), TEXTS, tiny_tokenizer(), steps=2)
            came["taught"] += 1

    @precondition(can_do_more)
    @rule()
    def export(self):
        self.left -= 1
        with tempfile.TemporaryDirectory() as parent, suppress(SecateurError):
            self.model.save_pretrained(Path(parent) / "folder")
            export_standalone(Path(parent) / "folder", Path(parent) / "out")
            came["standalone"] += 1

    @precondition(lambda self: self.adapted is None)
    @rule()
    def wrap(self):
        self.is_own = False
        self.adapted = peft.get_peft_model(self.model, peft.LoraConfig(r=2, target_modules=ADAPTED[self.kind]))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)

    @precondition(lambda self: self.adapted is not None)
    @rule()
    def merge(self):
        self.model, self.adapted, self.is_own = self.adapted.merge_and_unload().eval(), None, False

    @rule(first=st.booleans(), counted=st.booleans())
    def drop_a_layer(self, first, counted):
        layers = self.model.get_submodule(LAYERS[self.kind])
        if len(layers) > 1:
            self.is_own = False
            del layers[0 if first else -1]
            self.model.config.num_hidden_layers -= counted

    @rule(name=st.sampled_from(sorted(ROUNDED)))
    def cast(self, name):
        self.is_own = False
        self.model.to(ROUNDED[name])

    @rule(load=st.booleans())
    def save(self, load):
        if getattr(self.model.config, "head_pruning", None) is None:
            return  # transformers' own affair
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "folder"
            try:
                self.model.save_pretrained(folder)
            except SecateurError:
                assert not folder.exists()
                came["refused"] += 1
                return
            again = AutoModel.from_pretrained(folder, dtype="auto").eval()
        self.compare(again)
        came["given back"] += 1
        if load:
            self.model, self.adapted = again, None

    def teardown(self):
        if hasattr(self, "model"):
            self.save(load=False)
            if self.is_own and getattr(self.model.config, "head_pruning", None) is not None:
                self.verify()

    def verify(self):
        """What secateur alone has changed agrees with the first model, but where it was taught."""
        with tempfile.TemporaryDirectory() as parent:
            folder, dense = Path(parent) / "folder", Path(parent) / "dense"
            self.model.save_pretrained(folder)
            self.dense.save_pretrained(dense)
            found = verify_checkpoint(folder, dense)
        taught = getattr(self.model.config, "head_pruning", {}).get("distilled", False)
        assert found["verdict"] == ("trained" if taught else "equal"), found
        came["verified"] += 1

    def compare(self, again):
        one, other = self.model.state_dict(), again.state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name].double(), other[name].double()) for name in one)
        if same(self.model.parameters(), again.parameters()) and same(self.model.buffers(), again.buffers()):
            inputs = example_inputs(again)
            for a, b in zip(hidden_states(self.model, inputs), hidden_states(again, inputs), strict=True):
                assert torch.equal(a, b)


def same(one, other):
    """Are they the same in precision too? T5 loads some weights in float32, and a cast rounds what is not saved."""
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")
def test_a_folder_gives_back_what_was_saved_whatever_came_before():
    came.clear()
    run_state_machine_as_test(Workflow, settings=ORDERS)
    assert came["given back"] > 0 < came["refused"]
