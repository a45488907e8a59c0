"""Makes reference.json: the embeddings of sentences.txt by an implementation that shares nothing with this example.

    python make_reference.py [--model DIR] [--text FILE] [--out FILE]

Needs torch, transformers and safetensors. The model is transformers' BertModel in f32 with eager attention, one sentence
at a time, so that no padding and no mask take part; then the sentence-transformers recipe: the mean over all tokens,
scaled to length 1. Numbers are rounded to 7 significant digits.
"""

import argparse
import json
import pathlib
import platform

import safetensors
import tokenizers
import torch
import transformers

HERE = pathlib.Path(__file__).resolve().parent
MAX_TOKENS = 512


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=pathlib.Path, default=HERE.parents[2] / "models" / "all-MiniLM-L6-v2")
    parser.add_argument("--text", type=pathlib.Path, default=HERE / "sentences.txt")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "reference.json")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    tokenizer = transformers.BertTokenizer.from_pretrained(arguments.model)
    model = transformers.BertModel.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="eager", add_pooling_layer=False
    ).eval()

    lines = [line.strip() for line in arguments.text.read_text(encoding="utf-8").splitlines()]
    sentences = []
    for text in filter(None, lines):
        tokens = tokenizer(text, padding=False, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(input_ids=tokens["input_ids"]).last_hidden_state[0]
        embedding = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
        sentences.append(
            {
                "text": text,
                "tokens": hidden.shape[0],
                "embedding": [float(f"{value:.7g}") for value in embedding.tolist()],
            }
        )

    head = {
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "recipe": "transformers BertModel, f32, eager attention, one sentence at a time; mean of all tokens; L2 norm",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
        },
    }
    # One sentence a line, so that a changed sentence shows as one changed line.
    body = ",\n".join(json.dumps(sentence, ensure_ascii=False, separators=(",", ":")) for sentence in sentences)
    text = json.dumps(head, indent=1)[:-2] + ',\n "sentences": [\n' + body + "\n]}\n"
    json.loads(text)
    arguments.out.write_text(text, encoding="utf-8")
    print(f"{arguments.out.name}: {len(sentences)} sentences, {len(text)} bytes")


if __name__ == "__main__":
    main()
