"""Serving a hub in a test: models of zeros, and the few addresses that the client library asks."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save_file

from dslm.families import load_family

COMMIT = "c" * 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}


def write_model(folder: Path, *, shards: int = 1, **changes) -> Path:
    """A checkpoint of zeros in float32, large enough that a header is a small part of it."""
    config = CONFIG | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    layout = load_family("llama").layout(config)
    tensors = {name: np.zeros(tensor.shape, np.float32) for name, tensor in layout.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        save_file(
            {n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


class Hub(BaseHTTPRequestHandler):
    """The few addresses of the hub that the client library asks, over folders ``root/owner/name``."""

    root: Path
    sent: dict[str, int]
    refuse: dict[str, tuple[int, str]]

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.partition("?")[0].lstrip("/")
        parts = path.removeprefix("api/models/").split("/")
        folder = self.root / parts[0] / parts[1]
        if not folder.is_dir():
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if path.startswith("api/models/"):
            if self.refuse.get("api"):
                return self.reply(*self.refuse["api"], body)
            files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
            names = [str(p.relative_to(folder)) for p in files]
            if "tree" in parts:
                tree = [
                    {"type": "file", "path": n, "size": p.stat().st_size, "oid": f"{hash(n)}"}
                    for n, p in zip(names, files, strict=True)
                ]
                return self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
            info = {"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            return self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
        name = "/".join(parts[4:])
        if name in self.refuse:
            return self.reply(*self.refuse[name], body)
        if not (folder / name).is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
        return self.send_file(name, (folder / name).read_bytes(), body)

    def send_file(self, name, data, body):
        headers = {"ETag": f'"{len(data)}-{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, start, stop = 200, 0, len(data)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            status, start, stop = 206, int(first), min(int(last or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        if body:
            self.sent[name] = self.sent.get(name, 0) + stop - start
        return self.reply(status, data[start:stop], headers, body)

    def reply(self, status, data, headers, body):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine; `hub.root` holds its models, `hub.sent` counts the bytes of each file it sent."""
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub", "sent": {}, "refuse": {}})
    handler.root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield handler
    server.shutdown()
    server.server_close()


def weight_bytes(hub) -> int:
    return sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))
