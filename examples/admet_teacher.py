"""ADMET-AI's answers, member by member. Run apart, in the environment of admet-requirements.txt: JSON lines in and out.

{"about": true} -> {"properties": [...], "probabilities": how many of them, the first, are, "digest": of the weights}
{"smiles": [...]} -> {"members": [5][B][41]}: probabilities as they are, numbers in their unit
"""

import hashlib
import json
import sys
from pathlib import Path

out, sys.stdout = sys.stdout, sys.stderr  # whatever the libraries print is no answer

import torch  # noqa: E402
from admet_ai import ADMETModel  # noqa: E402  # pyright: ignore[reportMissingImports]
from admet_ai.constants import DEFAULT_MODELS_DIR  # noqa: E402  # pyright: ignore[reportMissingImports]
from chemprop.data import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    MoleculeDatapoint,
    MoleculeDataset,
    collate_batch,
)
from rdkit import Chem  # noqa: E402

torch.set_num_threads(1)
model = ADMETModel(num_workers=0, include_physchem=False, drugbank_path=None)
folders = sorted(Path(DEFAULT_MODELS_DIR).iterdir())  # as ADMETModel orders them: classification, then regression
assert [folder.name for folder in folders] == ["admet_classification", "admet_regression"]
for members in model.model_lists:
    for net in members:
        net.eval()


def about() -> dict:
    weights = {
        str(path.relative_to(DEFAULT_MODELS_DIR)): path.read_bytes() for path in DEFAULT_MODELS_DIR.rglob("*.pt")
    }
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(f"{name} {hashlib.sha256(weights[name]).hexdigest()}\n".encode())
    parameters = sum(p.numel() for members in model.model_lists for net in members for p in net.parameters())
    return {
        "properties": [task for tasks in model.task_lists for task in tasks],
        "probabilities": len(model.task_lists[0]),
        "digest": total.hexdigest(),
        "bytes": sum(map(len, weights.values())),
        "parameters": parameters,
    }


@torch.inference_mode()
def answer(smiles: list[str]) -> list:
    """What ADMETModel.predict averages, before it does: graphs are made once for all ten networks.

    Batches are made here: chemprop's build_dataloader leaves out a last batch of one molecule.
    """
    data = MoleculeDataset([MoleculeDatapoint(mol=Chem.MolFromSmiles(one)) for one in smiles])
    found = []
    for start in range(0, len(data), 64):
        batch = collate_batch([data[row] for row in range(start, min(start + 64, len(data)))])
        tasks = [torch.stack([net(batch.bmg, batch.V_d, batch.X_d) for net in nets]) for nets in model.model_lists]
        found.append(torch.cat(tasks, -1))
    return torch.cat(found, 1).tolist()


for line in sys.stdin:
    asked = json.loads(line)
    said = about() if "about" in asked else {"members": answer(asked["smiles"])}
    out.write(json.dumps(said) + "\n")
    out.flush()
