"""A model hub of one repository in memory: what huggingface_hub sends over the network ends here."""

import base64
import hashlib
import json
import re
import sys

import huggingface_hub

REPOSITORY = "someone/small"
_COMMIT = "a" * 40


class Hub:
    """Answers the requests of `push_to_hub` and `from_pretrained`; `files` is what was pushed."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        # The package that huggingface_hub makes its requests with.
        self.http = sys.modules[type(huggingface_hub.get_session()).__module__.partition(".")[0]]

    def client(self):
        return self.http.Client(transport=self.http.MockTransport(self.answer))

    def answer(self, request):
        path = request.url.path
        if path == "/api/repos/create":
            return self._json({"url": f"https://huggingface.co/{REPOSITORY}", "id": REPOSITORY, "name": REPOSITORY})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(request.content)["files"]]
            return self._json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        if "/commit/" in path:
            for line in map(json.loads, request.content.decode().splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"https://huggingface.co/{REPOSITORY}/commit/{_COMMIT}"
            return self._json({"commitUrl": url, "commitOid": _COMMIT, "success": True})
        if path.startswith(f"/api/models/{REPOSITORY}"):
            if "/tree/" in path:
                return self._json([self._entry(name, content) for name, content in self.files.items()])
            siblings = [{"rfilename": name} for name in self.files]
            return self._json({"id": REPOSITORY, "sha": _COMMIT, "siblings": siblings})
        match = re.fullmatch(rf"/{REPOSITORY}/resolve/[^/]+/(.*)", path)
        if match and match[1] in self.files:
            content = self.files[match[1]]
            headers = {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": _COMMIT, "Content-Length": str(len(content))}
            return self.http.Response(200, content=b"" if request.method == "HEAD" else content, headers=headers)
        missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": _COMMIT}
        return self.http.Response(404, json={"error": "not found"}, headers=missing)

    def _json(self, data):
        return self.http.Response(200, json=data)

    def _entry(self, name, content):
        return {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
