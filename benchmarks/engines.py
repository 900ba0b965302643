"""Texts under vectors: tokens a second, by the model and by vLLM, in turns.

OMP_NUM_THREADS=1 .venv-engines/bin/python -m benchmarks.engines   # after `make engines`
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import tl_melbo as tm
from tl_melbo.model.load import load_hugging_face

PROMPT, N_TOKENS = "Tell me about yourself.", 40


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--counts", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--turns", type=int, default=3)
    chosen = parser.parse_args()
    model = tm.load_model(device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        for part in load_hugging_face(None, "cpu", torch.float32)[:2]:
            part.save_pretrained(Path(folder) / "model")
        options = {
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": 256,
            "enforce_eager": True,
        }
        engine = tm.engines.vllm(Path(folder) / "model", **options)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
        for count in chosen.counts:
            theta = torch.randn(count, 576, generator=torch.Generator().manual_seed(0))
            theta = 12 * theta / theta.norm(dim=-1, keepdim=True)
            found = tm.SteeringVectors.from_tensor(theta, source_layer=8)
            seconds: dict[str, list[float]] = {"ours": [], "vLLM": []}
            written = {}
            tm.generate(model, PROMPT, found[0], chat=True, max_new_tokens=2, engine=engine)
            for _ in range(chosen.turns):
                for name, by in (("ours", None), ("vLLM", engine)):
                    began = time.perf_counter()
                    frame = tm.generate(
                        model, PROMPT, found, chat=True, max_new_tokens=N_TOKENS, engine=by
                    )
                    seconds[name].append(time.perf_counter() - began)
                    written[name] = frame["completion"].tolist()
            encode = model.tokenizer.encode
            tokens = sum(len(encode(text, add_special_tokens=False)) for text in written["ours"])
            same = sum(map(str.__eq__, written["ours"], written["vLLM"]))
            rates = {name: tokens / statistics.median(each) for name, each in seconds.items()}
            told = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
            print(f"{count} x {N_TOKENS}: tokens a second: {told}; {same} of {count} texts alike")


if __name__ == "__main__":
    main()
