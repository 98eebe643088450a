"""What torch would keep of an export is let go of, of this thread's alone."""

import gc
import linecache
import threading
import weakref

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph_module import _loader

from secateur.exporting.traces import traces_forgotten


class Doubled(torch.nn.Module):
    def forward(self, x):
        return x * x.shape[0]


def export():
    """Export with a symbolic size; return a reference to what torch keeps."""
    sizes = {"x": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(Doubled(), (torch.ones(3, 2),), dynamic_shapes=sizes)
    held = next(node.meta["val"] for node in program.graph.nodes if "val" in node.meta)
    return weakref.ref(held.fake_mode.shape_env)


def source():
    """Let torch generate code; return the name that it keeps it under."""
    return torch.fx.symbolic_trace(Doubled()).forward.__code__.co_filename


@pytest.mark.parametrize("fails", [False, True])
def test_what_torch_keeps_is_forgotten(fails):
    """But for the last shapes, which torch itself lets go of when another comes."""
    constructor, found, sources = ShapeEnv.__init__, [], set(_loader.eval_cache)

    def run():
        with traces_forgotten():
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
    assert set(_loader.eval_cache) == sources
    assert not [name for name in linecache.cache if "eval_with_key" in name and name not in sources]
    assert ShapeEnv.__init__ is constructor


def test_other_threads_keep_theirs():
    constructor = ShapeEnv.__init__
    begun, ended, made, sources = threading.Event(), threading.Event(), [], []

    def other():
        with traces_forgotten():
            made.append(ShapeEnv(tracked_fakes=[]))
            sources.append(source())
            begun.set()
            ended.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait(60)
    outside = ShapeEnv(tracked_fakes=[])
    sources.append(source())
    with traces_forgotten():
        inside = ShapeEnv(tracked_fakes=[])
        sources.append(source())
    assert (inside.tracked_fakes, outside.tracked_fakes, made[0].tracked_fakes) == (None, [], [])
    assert [name in _loader.eval_cache for name in sources] == [True, True, False]
    ended.set()
    thread.join()
    assert [name in _loader.eval_cache for name in sources] == [False, True, False]
    assert made[0].tracked_fakes is None
    assert ShapeEnv.__init__ is constructor
