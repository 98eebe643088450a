"""What people do to a model, in any order: where heads went, its folder gives it back, or saving it is refused.

`make fuzz` tries many more orders than the suite does, and others each time.
"""

import os
import tempfile
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from transformers import AutoModel

from secateur.errors import SecateurError
from secateur.models.inputs import example_inputs
from secateur.removal.proof import hidden_states
from secateur.removal.remove import remove_
from secateur.scorers.score import score
from secateur.settings import Reading
from secateur.units.select import select
from tests.support.tiny import ADAPTED, LAYERS, tiny_model

ROUNDED = {"half": torch.float16, "bfloat16": torch.bfloat16, "float": torch.float32}


CASES = int(os.environ.get("FUZZ_CASES", 500))
ORDERS = settings(
    max_examples=CASES // 50,
    stateful_step_count=12,
    derandomize=CASES <= 2000,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
came: Counter[str] = Counter()


class Workflow(RuleBasedStateMachine):
    """One model; `adapted` is what PEFT made of it, while an adapter is there."""

    @initialize(kind=st.sampled_from(sorted(ADAPTED)))
    def start(self, kind):
        self.kind, self.model, self.adapted = kind, tiny_model(kind), None

    @rule(seed=st.integers(0, 99), ratio=st.sampled_from([0.2, 0.5]))
    def prune(self, seed, ratio):
        try:
            scores = score(self.model, scorer="random", reading=Reading(seed=seed))
            remove_(self.model, select(scores, ratio))
        except SecateurError:  # what cannot be pruned is as it was
            pass

    @precondition(lambda self: self.adapted is None)
    @rule()
    def wrap(self):
        self.adapted = peft.get_peft_model(self.model, peft.LoraConfig(r=2, target_modules=ADAPTED[self.kind]))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)

    @precondition(lambda self: self.adapted is not None)
    @rule()
    def merge(self):
        self.model, self.adapted = self.adapted.merge_and_unload().eval(), None

    @rule(first=st.booleans(), counted=st.booleans())
    def drop_a_layer(self, first, counted):
        layers = self.model.get_submodule(LAYERS[self.kind])
        if len(layers) > 1:
            del layers[0 if first else -1]
            self.model.config.num_hidden_layers -= counted

    @rule(name=st.sampled_from(sorted(ROUNDED)))
    def cast(self, name):
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
