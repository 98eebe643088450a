"""What torch would keep of an export is let go of, of this thread's alone."""

import gc
import threading
import weakref

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from secateur.exporting.symbolic_shapes import symbolic_shapes_forgotten


class Doubled(torch.nn.Module):
    def forward(self, x):
        return x * x.shape[0]


def export():
    """Export with a symbolic size; return a reference to what torch keeps."""
    sizes = {"x": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(Doubled(), (torch.ones(3, 2),), dynamic_shapes=sizes)
    held = next(node.meta["val"] for node in program.graph.nodes if "val" in node.meta)
    return weakref.ref(held.fake_mode.shape_env)


@pytest.mark.parametrize("fails", [False, True])
def test_what_torch_learns_of_shapes_is_forgotten(fails):
    """But for the last one, which torch itself lets go of when another comes."""
    constructor, found = ShapeEnv.__init__, []

    def run():
        with symbolic_shapes_forgotten():
            found.append(export())
            if fails:
                raise KeyboardInterrupt

    for _ in range(4):
        if fails:
            with pytest.raises(KeyboardInterrupt):
                run()
        else:
            run()
    for _ in range(2):  # of what held the first ones others are let go of only then
        gc.collect()
    assert [one() is None for one in found[:3]] == [True] * 3
    assert ShapeEnv.__init__ is constructor


def test_other_threads_keep_theirs():
    constructor = ShapeEnv.__init__
    begun, ended, made = threading.Event(), threading.Event(), []

    def other():
        with symbolic_shapes_forgotten():
            made.append(ShapeEnv(tracked_fakes=[]))
            begun.set()
            ended.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait(60)
    outside = ShapeEnv(tracked_fakes=[])
    with symbolic_shapes_forgotten():
        inside = ShapeEnv(tracked_fakes=[])
    assert (inside.tracked_fakes, outside.tracked_fakes, made[0].tracked_fakes) == (None, [], [])
    ended.set()
    thread.join()
    assert made[0].tracked_fakes is None
    assert ShapeEnv.__init__ is constructor
