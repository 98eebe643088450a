"""A process without secateur."""

# In a virtual environment without secateur, `import secateur` raises ModuleNotFoundError: so it does here, for the
# package and everything in it, before transformers is imported. What the folder's code may import is checked on its own
# (`test_the_code_needs_nothing_but_torch_and_transformers`), so that other packages of the environment cannot help it.
BARE = """
import importlib.abc, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "secateur":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import torch, transformers
torch.set_num_threads(1)
for job in json.loads(sys.argv[1]):
    inputs = torch.load(job["inputs"])
    found = {}
    for auto in job["autos"]:
        model = getattr(transformers, auto).from_pretrained(job["folder"], trust_remote_code=True).eval()
        model.save_pretrained(job["folder"] + "-again")
        again = getattr(transformers, auto).from_pretrained(job["folder"] + "-again", trust_remote_code=True).eval()
        for number, one in enumerate([model, again]):
            with torch.no_grad():
                found[f"{auto} {number}"] = one(**inputs)[0]
            if auto == "AutoModelForCausalLM":
                made = one.generate(**inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
                found[f"generated {number}"] = made
    torch.save(found, job["outputs"])
assert not [name for name in sys.modules if name.startswith("secateur")]
"""
