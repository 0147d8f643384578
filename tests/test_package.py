"The package as others get it: what the wheel holds, that it needs neither Jupyter nor nbdev, and what its texts name."
import ast, re, subprocess, sys, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(p.stem for p in (ROOT/'mem_nb').glob('*.py') if p.name[0]!='_')
BLOCK = '''
import importlib.abc, importlib.util, sys
class Block(importlib.abc.MetaPathFinder):
    "Pretends that what a plain installation lacks is absent."
    names = set('nbdev execnb IPython ipykernel ipywidgets jupyterlab jupyter_core wandb h5py hdf5plugin aedat tonic pytest'.split())
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in self.names: raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Block())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split('.')[0] in Block.names else find(name, package)
'''

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from a copy so that nothing is left in the tree."
    import shutil
    there = tmp_path_factory.mktemp('package')
    for name in ('mem_nb','configs'): shutil.copytree(ROOT/name, there/name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('settings.ini','setup.py','README.md','LICENSE','NOTICE','MANIFEST.in'): shutil.copy(ROOT/name, there)
    pytest.importorskip('build')
    told = subprocess.run([sys.executable, '-m', 'build', '-w', '-s', '--no-isolation', '-o', there/'dist', there], capture_output=True, text=True)
    assert told.returncode==0, told.stdout[-1500:] + told.stderr[-1500:]
    assert list((there/'dist').glob('*.tar.gz'))
    return next((there/'dist').glob('*.whl'))

@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    "The wheel unpacked, as pip would lay it."
    folder = tmp_path_factory.mktemp('site')
    zipfile.ZipFile(wheel).extractall(folder)
    return folder

def run_in(folder, code, *args):
    return subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {str(folder)!r})\n{BLOCK}\n{code}', *args],
                          capture_output=True, text=True, cwd=folder, env={'PATH':'', 'HOME':str(folder), 'PYTHONPATH':'', 'OMP_NUM_THREADS':'1'})

def test_the_wheel_holds_every_module_the_marker_and_the_configurations(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f'mem_nb/{m}.py' for m in MODULES} | {'mem_nb/py.typed','mem_nb/configs/demo.conf','mem_nb/configs/nmnist.conf'} <= names
    assert not [n for n in names if n.startswith(('tests','nbs','benchmarks'))]

def test_every_module_imports_without_extras(installed):
    told = run_in(installed, f'import importlib, mem_nb\nfor m in {MODULES}: importlib.import_module("mem_nb."+m)\nprint(mem_nb.__file__)')
    assert told.returncode==0, told.stderr[-2000:]
    assert told.stdout.strip().startswith(str(installed))

def test_help_loads_nothing_heavy(installed):
    told = run_in(installed, 'from mem_nb.pipeline import main\ntry: main(["--help"])\nfinally: print("LOADED", *sys.modules)')
    text,_,loaded = told.stdout.partition('LOADED')
    assert 'mem_nb demo' in text
    assert not {'torch','numpy','timm','matplotlib'} & set(loaded.split())

def test_an_installed_package_brings_its_configurations(installed):
    told = run_in(installed, 'from mem_nb.pipeline import command\ncommand("config", "configs/nmnist.conf")')
    assert told.returncode==0, told.stderr[-2000:]
    split = Path(re.search(r'split_file = (.*)', told.stdout)[1])
    assert (installed/split).is_file()

def test_pythons_and_extras_are_declared(wheel):
    meta = zipfile.ZipFile(wheel).read(next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith('METADATA'))).decode()
    assert 'Requires-Python: >=3.10' in meta
    assert set(re.findall(r'Provides-Extra: (\w+)', meta)) >= {'jupyter','formats','wandb','dev'}
    for minor in (10,11,12,13): assert f'Python :: 3.{minor}\n' in meta

@pytest.mark.parametrize('module', MODULES)
def test_the_source_is_that_of_python_310(module):
    "A star within square brackets is new in 3.11, and `ast` does not refuse it for 3.10."
    text = (ROOT/'mem_nb'/f'{module}.py').read_text(encoding='utf-8')
    within = [n.slice for n in ast.walk(ast.parse(text, feature_version=(3,10))) if isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Tuple)]
    stars = [n.lineno for n in within if any(isinstance(e, ast.Starred) for e in n.elts) and ast.get_source_segment(text, n)[0]!='(']
    assert not stars, f'{module}.py, line {stars[0]}: a[x,*y]; write a[(x,*y)]'

def test_the_text_for_language_models_names_every_module():
    text = (ROOT/'llms.txt').read_text(encoding='utf-8')
    assert text.startswith('# mem_nb\n') and [m for m in MODULES if f'`mem_nb.{m}`' not in text]==[]
