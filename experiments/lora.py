"""LoRA adapters of a causal language model, trained by peers that each keep their own texts.

pip install 'jwins[lora]', then: jwins launch --script experiments/lora.py --nodes 3
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

import jwins
from jwins.integrations.transformers import PeerCallback
from jwins.tasks.plays import CLASSES, bundled_plays, codes

_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def adapted_model(folder: str | None) -> Any:
    """Return a model from a local folder, or a small one with random weights, of which only adapters train."""
    torch.manual_seed(1)  # frozen weights and adapters begin alike on all peers
    if folder:
        base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    else:
        config = transformers.LlamaConfig(vocab_size=CLASSES, initializer_range=0.2, **_SMALL)
        base = transformers.LlamaForCausalLM(config)
    return get_peft_model(base, LoraConfig("CAUSAL_LM", r=8, lora_alpha=32, target_modules="all-linear"))


def samples(texts: list[str], folder: str | None, length: int = 64) -> list[dict[str, torch.Tensor]]:
    """Return pieces of equal length, in tokens of the folder's model or in characters."""
    encode = transformers.AutoTokenizer.from_pretrained(folder).encode if folder else codes
    tokens = torch.cat([torch.as_tensor(encode(text), dtype=torch.int64) for text in texts])
    return [{"input_ids": piece, "labels": piece} for piece in tokens.split(length)[:-1]]


def train(model: Any, texts: list[str], callbacks: list[Any], folder: str | None, steps: int) -> float:
    """Train the adapters on these texts but for their ends, and return the loss on the ends of all plays."""
    arguments = transformers.TrainingArguments(
        max_steps=steps, learning_rate=3e-3, report_to=[], save_strategy="no", disable_tqdm=True
    )
    training = samples([text[: -len(text) // 10] for text in texts], folder)
    test = samples([play[-len(play) // 10 :] for play in bundled_plays()], folder)
    trainer = transformers.Trainer(model, arguments, None, training, test, callbacks=callbacks)
    trainer.train()
    return float(trainer.evaluate()["eval_loss"])


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--model", help="local folder of a causal language model")
    options.add_argument("--steps", type=int, default=300)
    given = options.parse_args()
    model = adapted_model(given.model)
    peer = jwins.Peer(model, params=lambda name: "lora_" in name, sharing=jwins.sharing.closed_loop())
    callback = PeerCallback(peer, every_steps=5)
    mine = list(bundled_plays()[int(peer.name.rpartition("-")[2]) :: 3])  # every third play
    loss = train(model, mine, [callback], given.model, given.steps)
    sent = callback.exchange_times.report.bytes_total
    print(f"{peer.name}: loss {loss:.3f} on all plays, {sent / 1e3:.0f} kB sent")
