"Run notebooks from top to bottom and store their outputs; cells that carry a flag of tst_flags keep the outputs they have."
import sys, time
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives
from execnb.nbio import NbCell

class Client(NotebookClient):
    "Runs a notebook as nbdev_test does: flagged cells and those with `eval: false` are left alone."
    flags = frozenset(get_config().tst_flags.split())

    def skips(self, cell):
        told = extract_directives(NbCell(0, dict(cell)), remove=False) if cell.cell_type=='code' else {}
        return bool(self.flags & told.keys()) or told.get('eval:', [''])[0].lower()=='false'

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        if self.skips(cell): return cell
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)

def run(
    path:Path,  # notebook, written in place only if every cell ran
):
    "Run one notebook, clean it, say how long it took."
    start,nb = time.time(),nbformat.read(path, as_version=4)
    Client(nb, timeout=900, kernel_name='python3', resources={'metadata':{'path':str(path.parent)}}).execute()
    nbformat.write(nb, path)
    nbdev_clean(str(path))
    print(f'{path.name}: {time.time()-start:.0f} s', flush=True)

if __name__ == '__main__':
    for path in map(Path, sys.argv[1:] or sorted(nbglob())): run(path)
