"Write README.md and its pictures from nbs/index.ipynb; with --check, only say whether they are what they should be."
import re, sys
from pathlib import Path
import nbformat
from execnb.nbio import nb2str
from nbconvert import MarkdownExporter
from nbdev.config import get_config
from nbdev.process import NBProcessor
from nbdev.processors import filter_stream_, hide_, hide_line, rm_export, strip_ansi

ROOT = get_config().config_path
PICTURES = 'docs/images'  # relative to README.md, so that it reads anywhere

def processed(
    path:Path,  # notebook
) -> nbformat.NotebookNode:
    "The notebook without hidden cells and directives, ready for nbconvert; a cell's `fig-alt` moves to its metadata."
    # nbdev's own list of processors would also add front matter, a warning and links, and run cells
    nb = NBProcessor(path, procs=[strip_ansi, hide_line, filter_stream_, rm_export, hide_], process=True).nb
    told = [c.directives_ for c in nb.cells]
    nb = nbformat.reads(nb2str(nb), as_version=4)
    nb.metadata['language_info'] = {'name':'python'}  # the language of the fences; nbdev_clean removed it
    for cell,directives in zip(nb.cells, told):
        cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M)
        cell.metadata['alt'] = ' '.join(directives.get('fig-alt:', ['figure']))
        if directives.get('echo:')==['false']: cell.metadata['transient'] = {'remove_source':True}
    return nb

def readme(
    path:Path,  # notebook
) -> tuple:     # text of README.md, {path of a picture from README.md: its bytes}
    "What README.md and its pictures should be."
    nb = processed(path)
    text,resources = MarkdownExporter().from_notebook_node(nb)
    pictures = {}
    for i,(name,data) in enumerate(resources['outputs'].items(), 1):  # name: output_<cell>_<output>.png
        pictures[new := f'{PICTURES}/readme_{i}{Path(name).suffix}'] = data
        alt = nb.cells[int(name.split('_')[1])].metadata['alt']
        text = re.sub(rf'!\[[^]]*\]\({re.escape(name)}\)', lambda m: f'![{alt}]({new})', text)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n', pictures

def stale(
    files:dict,  # path from the project's folder: bytes wanted
) -> list:       # paths of the files that are not so, or should not be there
    "What `--check` complains about."
    there = {f'{PICTURES}/{p.name}' for p in (ROOT/PICTURES).glob('readme_*')}
    differ = [k for k,v in files.items() if not (ROOT/k).is_file() or (ROOT/k).read_bytes()!=v]
    return sorted(there - files.keys()) + differ

if __name__ == '__main__':
    text,pictures = readme(ROOT/'nbs'/'index.ipynb')
    files = {'README.md': text.encode(), **pictures}
    old = stale(files)
    if '--check' in sys.argv: sys.exit(f"out of date: {', '.join(old)}" if old else 0)
    for name in old:
        (ROOT/name).parent.mkdir(parents=True, exist_ok=True)
        if name in files: (ROOT/name).write_bytes(files[name])
        else: (ROOT/name).unlink()
    print(f"README.md is what nbs/index.ipynb shows; written: {', '.join(old) or 'nothing, it was already'}.")
