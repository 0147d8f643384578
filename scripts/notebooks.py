"Run notebooks from top to bottom and store their outputs; cells with a flag of tst_flags keep those they have."
import time
from pathlib import Path
import nbformat
from execnb.nbio import NbCell
from fastcore.script import call_parse
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives

VIEW = 'application/vnd.jupyter.widget-view+json'

class Client(NotebookClient):
    "Runs a notebook as nbdev_test does: cells with a flag in `left_out` or with `eval: false` stay as they are."
    left_out = frozenset()

    def skips(self, cell):
        told = extract_directives(NbCell(0, dict(cell)), remove=False) if cell.cell_type=='code' else {}
        return bool(self.left_out & told.keys()) or told.get('eval:')==['false']

    async def async_execute_cell(self, cell, cell_index, *args, **kwargs):
        if self.skips(cell): return cell
        return await super().async_execute_cell(cell, cell_index, *args, **kwargs)

def run(
    path:Path,     # notebook, written in place if every cell ran
    left_out:set,  # flags of the cells that are not run
):
    "Run one notebook, clean it, say how long it took."
    start,nb = time.time(),nbformat.read(path, as_version=4)
    client = Client(nb, timeout=900, kernel_name='python3', resources={'metadata':{'path':str(path.parent)}})
    client.left_out = left_out
    client.execute()
    for cell in nb.cells:  # a widget without a kernel is a line of noise; an explorer leaves its picture, a progress bar nothing
        views = [o['data'] for o in cell.get('outputs', ()) if VIEW in o.get('data', {})]
        for data in views: del data[VIEW]
        if views: cell.outputs = [o for o in cell.outputs if o.get('data') is None or 'image/png' in o['data'] or o['data'] not in views]
        if 'outputs' in cell: cell.outputs = [o for o in cell.outputs if not o.get('text', '').startswith('findfont:')]   # a machine's fonts
    nb.metadata.pop('widgets', None)
    nbformat.write(nb, path)
    nbdev_clean(str(path))
    print(f'{path.name}: {time.time()-start:.0f} s', flush=True)

@call_parse
def main(
    names:str='',  # notebooks, with spaces between; all without it
    flags:str='',  # flags whose cells are run, too: "cuda data slurm"
):
    "Run notebooks and store their outputs"
    left_out = set(get_config().tst_flags.split()) - set(flags.split())
    for path in names.split() or sorted(nbglob()): run(Path(path), left_out)
