"""Models that run out of memory, or whose values are not finite."""

CPU = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


def full_above(model, most, error=RuntimeError, text=CPU):
    """Let the model run out of memory for batches of more than `most` texts, and return the sizes it was given."""
    sizes = []

    def hook(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > most:
            raise error(text)

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return sizes


def poisoned(model, value=float("nan"), above=2):
    """Let the second layer compute a value that is not finite for batches of more than `above` texts."""

    def hook(module, args, output):
        if len(output) > above:
            output[0, 0] = value

    model.base_model.get_submodule("encoder.layer.1.attention.self.query").register_forward_hook(hook)
    return model
