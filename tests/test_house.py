"The rules of the house: what every notebook and module keeps to, whatever it does."
import ast, json, re, subprocess, sys
from functools import cache
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not re.search(r'/[._]', f'/{p.relative_to(ROOT)}'))
NUMBERED = [p for p in NOTEBOOKS if p.parent.name=='nbs' and re.match(r'\d\d[a-z]?_', p.name)]
TUTORIALS = [p for p in NOTEBOOKS if p.parent.name=='tutorials']
MODULES = sorted(p for p in (ROOT/'mem_nb').glob('*.py') if p.name[0]!='_')
def number(path): return path.stem.partition('_')[0]   # '02' < '02b' < '03', as text sorts
def module(path): return path.stem.partition('_')[2]
NUMBER = {module(p): number(p) for p in NUMBERED}

def each(paths): return pytest.mark.parametrize('path', paths, ids=[p.stem for p in paths])

@cache
def cells(path):
    "The cells of a notebook, `source` joined."
    nb = json.loads(path.read_text(encoding='utf-8'))
    return [dict(c, source=''.join(c['source'])) for c in nb['cells']]

def code(path): return [c for c in cells(path) if c['cell_type']=='code']
def outputs(path): return [o for c in code(path) for o in c['outputs']]
def exported(path): return [c['source'] for c in code(path) if re.match(r'\s*#\|\s*export[is]?\b', c['source'])]

def words(path):
    "Words of prose, without blocks of code."
    prose = '\n'.join(c['source'] for c in cells(path) if c['cell_type']=='markdown')
    return len(re.findall(r"\w[\w'’-]*", re.sub(r'```.*?```', '', prose, flags=re.S)))

def own_imports(tree):
    "(module, imported at the top level?) for each import of an own module; `from mem_nb import x` counts as x."
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = 'mem_nb' if node.level else ''
            full = '.'.join(filter(None, [stem, node.module]))
            names = [f'mem_nb.{a.name}' for a in node.names] if full=='mem_nb' else [full]
        else: continue
        yield from ((n.split('.')[1], id(node) in top) for n in names if n.startswith('mem_nb.'))

def stars(tree): return [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.names[0].name=='*']

def public(tree):
    "Top-level functions and classes whose names do not begin with an underscore."
    kinds = ast.FunctionDef|ast.AsyncFunctionDef|ast.ClassDef
    return [n for n in tree.body if isinstance(n, kinds) and n.name[0]!='_']

# ---- modules and imports
def test_there_are_notebooks_and_modules():
    assert NUMBERED and {p.stem for p in MODULES} == set(NUMBER)

@each(NUMBERED)
def test_one_word_for_a_notebook_and_its_module(path):
    names = [m[1] for c in code(path) if (m := re.match(r'\s*#\|\s*default_exp\s+(\S+)', c['source']))]
    assert names == [module(path)], f"{path.name} should have `#| default_exp {module(path)}`, once"

@each(NUMBERED)
def test_imports_point_to_lower_numbers(path):
    for source in exported(path):
        for name,at_top in own_imports(ast.parse(source)):
            assert name in NUMBER, f"{path.name} imports mem_nb.{name}, which no notebook exports"
            assert NUMBER[name] < number(path), f"{path.name} imports mem_nb.{name}, number {NUMBER[name]}"
            assert at_top or path.stem=='18_pipeline', f"{path.name} imports mem_nb.{name} inside a function"

@each(NOTEBOOKS)
def test_imports_are_by_name(path):
    for source in exported(path): assert not stars(ast.parse(source)), f"star import in {source[:80]!r}"
    found = [c['source'][:80] for c in code(path) if re.search(r'from mem_nb\S* import \*', c['source'])]
    assert not found, f"star import in {found[0]!r}"

def test_events_is_light():
    command = [sys.executable, '-c', 'import sys, mem_nb.events; print(*sys.modules)']
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert told.returncode==0, told.stderr[-2000:]
    heavy = {'torch', 'torchvision', 'timm', 'accelerate', 'wandb', 'ipywidgets', 'sklearn', 'matplotlib', 'pandas'}
    assert sorted(heavy & set(told.stdout.split())) == []

@each([p for p in MODULES if p.stem!='widgets'])
def test_extras_are_imported_where_they_are_used(path):
    # read from the source: timm itself imports wandb where it is installed, so sys.modules would not tell
    top = [n for n in ast.parse(path.read_text(encoding='utf-8')).body if isinstance(n, ast.Import|ast.ImportFrom)]
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or '' for n in top if isinstance(n, ast.ImportFrom)}
    extras = {'wandb', 'ipywidgets', 'mlxtend', 'h5py', 'hdf5plugin', 'evt3', 'aedat', 'tonic', 'faery', 'segmentation_models_pytorch'}
    assert sorted(extras & {n.split('.')[0] for n in names}) == []

@each(MODULES)
def test_public_names_have_a_docstring(path):
    bare = [n.name for n in public(ast.parse(path.read_text(encoding='utf-8'))) if not ast.get_docstring(n)]
    assert not bare, f"{path.name}: no docstring in {', '.join(bare)}"

# ---- notebooks
@each(NUMBERED)
def test_export_cells_are_short(path):
    lengths = [len(s.splitlines()) for s in exported(path)]
    assert max(lengths) <= 60, f"{path.name}: an export cell of {max(lengths)} lines"

@each(NUMBERED)
def test_modules_are_short(path):
    lines = [l for s in exported(path) for l in s.splitlines() if l.strip() and not l.startswith('#|')]
    assert len(lines) <= 300, f"{path.name} exports {len(lines)} lines"

@each(NUMBERED)
def test_notebooks_show_and_tell(path):
    kinds = {kind for o in outputs(path) for kind in o.get('data', {})}
    assert re.match(r'# .+\n+> .+', cells(path)[0]['source']), f"{path.name} should open with a title and a subtitle"
    assert 200<=words(path)<=500, f"{path.name}: {words(path)} words of prose"
    assert kinds & {'image/png', 'image/svg+xml'}, f"{path.name}: no stored picture; `make notebooks` stores them"

@each(TUTORIALS)
def test_tutorials_tell_and_show_and_export_nothing(path):
    kinds = {kind for o in outputs(path) for kind in o.get('data', {})}
    assert re.match(r'# .+\n+> .+', cells(path)[0]['source']), f"{path.name} should open with a title and a subtitle"
    assert 200<=words(path)<=500, f"{path.name}: {words(path)} words of prose"
    assert kinds & {'image/png', 'image/svg+xml'}, f"{path.name}: no stored picture; `make notebooks` stores them"
    assert not exported(path) and not any('default_exp' in c['source'] for c in code(path)), f"{path.name} exports"

@each(NOTEBOOKS)
def test_no_stored_errors(path):
    assert not [o['ename'] for o in outputs(path) if o['output_type']=='error']

# ---- everything
PLACES = '*.md *.txt *.ini *.py Makefile docs/**/*.md docs/*.py nbs/**/*.ipynb mem_nb/*.py configs/**/*.conf tests/*.py scripts/* benchmarks/* .ci/*'
TEXTS = [p for place in PLACES.split() for p in sorted(ROOT.glob(place)) if p.is_file()]
PICTURE = re.compile(r'"image/png": (?:"[^"]*"|\[[^]]*\])|base64,[A-Za-z0-9+/=\\n]+')
# a path that only one machine has
HERE = re.compile(r'(?<![\w.~:}/])/(?:home|root|Users|work|workspace|tmp|mnt|scratch)/[\w.-]+')

@each(TEXTS)
def test_no_paths_of_one_machine(path):
    found = set(HERE.findall(PICTURE.sub('', path.read_text(encoding='utf-8'))))
    assert not found, f"{path.name} names {', '.join(sorted(found)[:5])}"
