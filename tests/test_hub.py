"""Models from the Hub and back to it, against a server on this machine that speaks the Hub's protocol."""

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from diffusers import StableDiffusionPipeline
from harness import COLOSSALAI, TRADITIONAL, train
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from dreambooth.run.upload import model_card

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """Serves one folder as the model someone/tiny, and keeps what is uploaded."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        self.fetched: list[str] = []
        self.uploaded: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.created: dict = {}
        self.has_card = False
        self.is_private = True
        self.takes_commits = True
        self.slow_s = 0.0  # to take a commit

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def answer(self, body: bytes, **headers):
        self.send_response(200)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/someone/tiny/tree"):  # as huggingface_hub asks since release 1
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": f"{abs(hash(name)):x}"}
                for name, file in self.server.files.items()
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith("/api/models/someone/tiny"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer(json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith("/someone/tiny/resolve/") and (name := path.split("/", 5)[5]) in self.server.files:
            if self.command == "GET":
                self.server.fetched.append(name)
            body = self.server.files[name].read_bytes()
            self.answer(body, ETag=f'"{abs(hash((name, len(body)))):x}"')
        elif path == "/api/models/someone/out":
            self.answer(json.dumps({"id": "someone/out", "private": self.server.is_private}).encode())
        elif path.startswith("/someone/out/resolve/") and not self.server.has_card:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
        elif path.startswith("/someone/out/resolve/"):
            self.answer(b"mine", ETag='"1"')
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def do_POST(self):
        time.sleep(self.server.slow_s if "/commit" in self.path else 0)
        self.server.tokens.add(self.headers.get("Authorization", ""))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.answer(json.dumps({"url": f"{self.server.url}/someone/{json.loads(body)['name']}"}).encode())
        elif self.path == "/api/validate-yaml":
            self.answer(json.dumps({"errors": [], "warnings": []}).encode())
        elif self.path.startswith("/api/models/someone/out/preupload"):
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            self.answer(json.dumps({"files": files}).encode())
        elif self.path.startswith("/api/models/someone/out/commit") and self.server.takes_commits:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.url}/someone/out/commit/{COMMIT}"
            self.answer(json.dumps({"success": True, "commitUrl": url, "commitOid": COMMIT}).encode())
        else:
            self.send_error(404)


@pytest.fixture
def hub(tiny_model):
    server = Hub(tiny_model)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()


@pytest.fixture
def hub_env(hub, tmp_path):
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf_home")}


def test_a_hub_id_is_fetched_once_and_then_serves_offline(hub, hub_env, flags, tmp_path):
    flags |= {"pretrained_model_name_or_path": "someone/tiny", "revision": "main", "max_train_steps": 1}
    hub.files["safety_checker/model.safetensors"] = hub.files["model_index.json"]  # which is not fetched
    train(COLOSSALAI, flags | {"output_dir": tmp_path / "online"}, env=hub_env)
    assert "unet/diffusion_pytorch_model.safetensors" in hub.fetched
    hub.fetched.clear()
    for name, env in (("offline", {"HF_HUB_OFFLINE": "1"}), ("unreachable", {"HF_ENDPOINT": "http://127.0.0.1:9"})):
        train(TRADITIONAL, flags | {"output_dir": tmp_path / name}, env=hub_env | env)
        StableDiffusionPipeline.from_pretrained(tmp_path / name)
    assert hub.fetched == []


def test_of_another_vae_no_more_is_fetched(hub, hub_env, flags, tmp_path):
    """Though it is in the repository of a model; once, and then it serves offline."""
    flags |= {"pretrained_vae_model_name_or_path": "someone/tiny", "max_train_steps": 1}
    train(TRADITIONAL, flags | {"output_dir": tmp_path / "online"}, env=hub_env)
    assert set(hub.fetched) == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    train(COLOSSALAI, flags | {"output_dir": tmp_path / "offline"}, env=hub_env | {"HF_HUB_OFFLINE": "1"})
    flags |= {"pretrained_vae_model_name_or_path": "someone/else"}
    done = train(COLOSSALAI, flags, env=hub_env, check=False)
    assert done.returncode == 2 and len(done.error_lines) == 1 and "Traceback" not in done.stderr
    assert "--pretrained_vae_model_name_or_path someone/else is no folder, and cannot be had from" in done.stderr


@pytest.mark.parametrize("script", [COLOSSALAI, TRADITIONAL])
def test_the_pipeline_is_pushed(script, hub, hub_env, flags, tmp_path):
    """All of it, and nothing else: no checkpoints, logs or files of the user, no path of this machine, no token."""
    flags |= {"max_train_steps": 2, "save_steps": 1, "push_to_hub": True, "hub_token": TOKEN, "logging_dir": "./logs/"}
    flags |= {"hub_model_id": "out", "output_dir": tmp_path / "mine", "hub_private_repo": script == COLOSSALAI}
    flags["output_dir"].mkdir()
    (flags["output_dir"] / "notes.txt").write_text("mine")
    done = train(script, flags, env=hub_env)
    asked = hub.created.get("private"), hub.created.get("visibility") == "private"  # before its release 2, and since
    assert hub.tokens == {f"Bearer {TOKEN}"} and any(asked) == (script == COLOSSALAI)
    card = ModelCard(hub.uploaded.pop("README.md").decode())
    assert card.data.instance_prompt == flags["instance_prompt"] and "dreambooth" in card.data.tags
    assert (
        card.data.base_model is None
        and "in 2\nsteps.\n" in card.text
        and 'from_pretrained("someone/out")' in card.text
    )
    for name, content in hub.uploaded.items():
        (tmp_path / "pushed" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pushed" / name).write_bytes(content)
        assert name.split("/")[0] in {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
        assert str(flags["pretrained_model_name_or_path"]).encode() not in content
    StableDiffusionPipeline.from_pretrained(tmp_path / "pushed")
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in path.read_bytes() for path in flags["output_dir"].rglob("*") if path.is_file())


def test_an_upload_that_fails_is_one_line(hub, hub_env, flags):
    """The pipeline is there."""
    hub.takes_commits = False
    hub.has_card = True
    flags |= {"max_train_steps": 1, "push_to_hub": True, "hub_token": TOKEN}
    done = train(COLOSSALAI, flags, env=hub_env, check=False)
    assert done.returncode == 1 and len(done.error_lines) == 1 and "Traceback" not in done.stderr
    assert f"the pipeline is whole in {flags['output_dir']}" in done.error_lines[0]
    command = re.search(r": (python -c .*) uploads it$", done.error_lines[0])[1]
    hub.takes_commits = True
    words = shlex.split(command)
    subprocess.run([sys.executable, *words[1:]], env=os.environ | hub_env | {"HF_TOKEN": TOKEN}, check=True)
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= hub.uploaded.keys()
    assert not any(name.startswith(("logs", "checkpoint", "dreambooth.json")) for name in hub.uploaded)
    StableDiffusionPipeline.from_pretrained(flags["output_dir"])


def test_adapters_are_pushed_beside_a_card_that_is_there(hub, hub_env, flags):
    hub.has_card = True
    flags |= {"max_train_steps": 1, "push_to_hub": True, "hub_token": TOKEN, "lora_rank": 2}
    train(TRADITIONAL, flags | {"pretrained_model_name_or_path": "someone/tiny"}, env=hub_env)
    assert hub.uploaded.keys() == {"pytorch_lora_weights.safetensors"}
    card = ModelCard(model_card(flags["output_dir"], "someone/out", None))
    assert (
        card.data.base_model == "someone/tiny"
        and "lora" in card.data.tags
        and "from someone/tiny, in 1\nsteps." in card.text
    )
    assert 'from_pretrained("someone/tiny")\npipeline.load_lora_weights("someone/out")' in card.text


def test_a_public_repository_is_not_taken_for_a_private_one(hub, hub_env, flags):
    hub.is_private = False
    flags |= {"push_to_hub": True, "hub_token": TOKEN, "hub_private_repo": True}
    done = train(COLOSSALAI, flags, env=hub_env, check=False)
    assert done.returncode == 2 and "--hub_private_repo: someone/out is there, and is public" in done.error_lines[0]


def test_a_run_that_is_refused_leaves_no_repository(hub, hub_env, flags, tmp_path):
    """Though that is found out only when the model is loaded."""
    shutil.copytree(flags["pretrained_model_name_or_path"], tmp_path / "model")
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"conv_in.bias": weights["conv_in.bias"] * torch.nan}, file, {"format": "pt"})
    flags |= {"push_to_hub": True, "hub_token": TOKEN, "pretrained_model_name_or_path": tmp_path / "model"}
    done = train(COLOSSALAI, flags, env=hub_env, check=False)
    assert done.returncode == 2 and "conv_in.bias is not finite" in done.error_lines[0]
    assert hub.created == {}


def test_a_model_that_is_not_there_is_one_line(hub, hub_env, flags):
    done = train(COLOSSALAI, flags | {"pretrained_model_name_or_path": "someone/else"}, env=hub_env, check=False)
    assert done.returncode == 2 and len(done.error_lines) == 1
    assert "someone/else is no folder, and cannot be had from the Hub" in done.error_lines[0]
