"""The results of a bench that runs methods on workloads: printed, checked, and written as JSON."""

import json
import sys

import torch


def facts(ours, stream, **more):
    """The machine and the versions that results depend on. `ours` is this library's device."""
    return {
        "device": "cpu" if stream is None else torch.cuda.get_device_name(),
        "ours": ours.info().name.decode(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **more,
    }


class Report:
    """The facts of a run and, under `key`, one entry for each workload."""

    def __init__(self, facts, key):
        print(json.dumps(facts))
        self.facts, self.key, self.entries, self.wrong = facts, key, [], []

    def add(self, name, title, entry, plan, results, line, is_right):
        """Prints and keeps the results of the workload `name`. `line` and `is_right` take the name of a
        method and its result."""
        print(f"\n{title}; ours: {plan}")
        for method, result in results.items():
            print(f"  {line(method, result)}")
            if not is_right(method, result):
                self.wrong.append(f"{name}: {method}")
        sys.stdout.flush()
        self.entries.append({**entry, "plan": plan, "methods": results})

    def finish(self, path):
        """Writes the JSON file, if there is a path, and exits with an error if a result was
        wrong."""
        if path:
            path.write_text(json.dumps({**self.facts, self.key: self.entries}, indent=1) + "\n")
        if self.wrong:
            sys.exit(f"wrong results: {', '.join(self.wrong)}")
