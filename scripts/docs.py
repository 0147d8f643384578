"Build the documentation in _docs/ from the notebooks as they are stored: pages, reference, gallery; then check it."
import base64, html, inspect, json, re, shutil, sys
from collections import Counter
from dataclasses import fields, is_dataclass
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
from fastcore.docments import docments
from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parents[1]
SOURCE,SITE = ROOT/'_proc'/'docs', ROOT/'_docs'
ADDRESS = re.compile(r'\bat 0x[0-9a-f]{4,}')   # another one in every process: no reader can use it
sys.path.insert(0, str(ROOT))

def notebooks(folder=ROOT/'nbs'): return sorted(p for p in folder.glob('*.ipynb') if p.stem!='index')
def title(nb): return nb.cells[0].source.splitlines()[0].removeprefix('# ')
def subtitle(nb): return next((l[2:] for l in nb.cells[0].source.splitlines() if l.startswith('> ')), '')

# ---- what there is to document
def modules() -> list:  # (name, number and name of its notebook), in order
    "Every module, and the notebook that it comes from."
    found = [(m[1], p) for p in notebooks() if (m := re.search(r'#\| default_exp (\w+)', p.read_text(encoding='utf-8')))]
    return [(name, p.stem) for name,p in found]

def public(name) -> list:  # names
    "The names that a module offers: `__all__`, without what it only passes on."
    module = import_module(f'mem_nb.{name}')
    own = lambda o: getattr(o, '__module__', f'mem_nb.{name}')==f'mem_nb.{name}' or not callable(o)
    return [n for n in module.__all__ if own(getattr(module, n))]

# ---- notebooks to pages
def as_page(
    path:Path,   # notebook
    links:dict,  # name in backticks -> Markdown
):
    "The notebook without hidden cells and directives; what it stored is kept, nothing is run."
    nb = nbformat.read(path, as_version=4)
    cells = []
    for cell in nb.cells:
        told = re.findall(r'^\s*#\|\s*(\w[\w-]*):?', cell.source, flags=re.M) if cell.cell_type=='code' else []
        if {'hide', 'default_exp'} & set(told): continue
        if cell.cell_type=='code':
            cell.source = re.sub(r'^\s*#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
            cell.metadata = {'tags': ['remove-input']} if 'echo' in told else {}
            for o in cell.outputs:
                if 'text' in o: o.text = re.sub(r'\x1b\[[0-9;]*m', '', o.text)
        else: cell.source = linked(cell.source, links)
        if cell.source.strip(): cells.append(cell)
    nb.cells = cells
    nb.metadata.language_info = {'name':'python'}
    return nb

def linked(text, links):
    "Names in backticks that are documented become links; code blocks and titles are left alone."
    parts = re.split(r'(^```.*?^```$|^#.*$)', text, flags=re.M|re.S)
    swap = lambda s: re.sub(r'(?<![\[`])`(?:mem_nb\.)?([\w.]+)`(?![`\]])', lambda m: links.get(m[1], m[0]), s)
    return ''.join(p if i%2 else swap(p) for i,p in enumerate(parts))

def all_links(root) -> dict:  # name -> Markdown
    "A function's name leads to the reference, a notebook's to its page; what two modules offer leads nowhere."
    names = [(n,m) for m,_ in modules() for n in public(m)]
    once = {n for n,k in Counter(n for n,_ in names).items() if k==1}
    links = {n: f'{{py:obj}}`{n} <mem_nb.{m}.{n}>`' for n,m in names if n in once and len(n)>3 and callable(getattr(import_module(f'mem_nb.{m}'), n))}
    return links | {p.stem: f'[`{p.stem}`]({root}/notebooks/{p.stem}.ipynb)' for p in notebooks()}

# ---- the reference
def cell_text(o): return re.sub(r'\s+', ' ', str(o)).replace('|', '\\|')

def shown_value(o) -> str:
    "A value as one would write it: a function or a class by its name, not by its place in memory; '' where there is no such way."
    text = getattr(o, '__name__', '') if callable(o) else ''
    text = text or re.sub(r"<(?:function|class|built-in function) '?(?:[\w<>]+\.)*<?(\w+)>?'?(?: at 0x[0-9a-f]+)?>", r'\1', repr(o))
    return '' if ADDRESS.search(text) else text

def shown_type(t):
    if t is inspect.Parameter.empty or t is None: return ''
    return f"`{t.__name__ if isinstance(t, type) else str(t).replace('typing.', '')}`"

def table(o, head='parameter') -> str:  # Markdown, empty if there is nothing to say
    "Name, type, default and comment of each parameter or field, from its docments."
    try: told = docments(o, full=True, returns=True)
    except Exception: return ''
    rows = []
    for name,d in told.items():
        if name in ('self','cls'): continue
        default = '' if d.default is inspect.Parameter.empty or name=='return' else shown_value(d.default)
        default = f'`{default}`' if 0<len(default)<=58 and 'factory' not in default else ''
        if name=='return' and not (d.docment or d.anno not in (None, inspect.Parameter.empty)): continue
        rows.append(f"| {'returns' if name=='return' else f'`{name}`'} | {cell_text(shown_type(d.anno))} | {cell_text(default)} | {cell_text(d.docment or '')} |")
    return '\n'.join([f'| {head} | type | default | |', '|---|---|---|---|', *rows]) if rows else ''

def signature(o):
    try: return '(' + ', '.join(str(p.replace(annotation=inspect.Parameter.empty, default=inspect.Parameter.empty)) + ('=…' if p.default is not inspect.Parameter.empty else '')
                                for n,p in inspect.signature(o).parameters.items() if n!='self') + ')'
    except (ValueError, TypeError): return '()'

def own_doc(o): return inspect.cleandoc(getattr(o, '__doc__', '') or '')

def describe(module, name) -> str:  # MyST
    "One public name: its signature, its sentence, its table; a class also shows its public methods."
    o = getattr(import_module(f'mem_nb.{module}'), name)
    full = f'mem_nb.{module}.{name}'
    if inspect.isclass(o):
        out = [f'## {name}', f'````{{py:class}} {full}{signature(o)}', own_doc(o), '', table(o, 'field' if is_dataclass(o) else 'parameter')]
        for n,f in vars(o).items():
            if n[0]!='_' and inspect.isfunction(f) and f.__module__==o.__module__:
                out += ['', f'```{{py:method}} {n}{signature(f)}', own_doc(f), '', table(f), '```']
        return '\n'.join(out + ['````'])
    if callable(o): return '\n'.join([f'## {name}', f'````{{py:function}} {full}{signature(o)}', own_doc(o), '', table(o), '````'])
    text = shown_value(o)
    return '\n'.join([f'## {name}', f'````{{py:data}} {full}', f'`{text}`' if 0<len(text)<300 else type(o).__name__ + (f' of {len(o)}' if hasattr(o, '__len__') else ''), '', constant(module, name), '````'])

def constant(module, name) -> str:
    "The comment that stands behind a constant in its source."
    source = inspect.getsource(import_module(f'mem_nb.{module}'))
    found = re.search(rf'^{name}\b.*?=.*?#\s*(.+)$', source, flags=re.M)
    return found[1] if found else ''

def passed_on(name, links) -> list:  # Markdown
    "Where a module offers nothing of its own: the names that it brings together, each with its sentence."
    module = import_module(f'mem_nb.{name}')
    if public(name): return []
    rows = [f'| {links.get(n, f"`{n}`")} | {cell_text(own_doc(getattr(module, n)))} |' for n in module.__all__]
    return ['\n'.join([f'`from mem_nb.{name} import …`', '', '| name | |', '|---|---|', *rows])] if rows else []

def reference(folder):
    "A page a module, and one with every setting."
    links = all_links('..')
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name,stem in modules():
        doc = import_module(f'mem_nb.{name}').__doc__
        body = '\n\n'.join([*passed_on(name, links), *(describe(name, n) for n in public(name))])
        (folder/f'{name}.md').write_text(f'# {name}\n\n{doc}\n\nWritten in [`{stem}`](../notebooks/{stem}.ipynb), where it is explained and tried.\n\n{body}\n', encoding='utf-8')
        rows.append(f'| [`{name}`]({name}.md) | {doc} |')
    (folder/'settings_keys.md').write_text(every_setting(), encoding='utf-8')
    pages = '\n'.join(n for n,_ in modules())
    (folder/'index.md').write_text('# Reference\n\nEvery public name, module by module; [every setting](settings_keys.md) of a `.conf` file.\n\n| module | |\n|---|---|\n'
                                   + '\n'.join(rows) + f'\n\n```{{toctree}}\n:hidden:\n\nsettings_keys\n{pages}\n```\n', encoding='utf-8')

def every_setting():
    "The keys of a `.conf` file with types, defaults and what they mean, section by section."
    from mem_nb.settings import Config, conf_keys
    keys = {(s,f.name): k for k,(s,f) in conf_keys().items()}
    out = ['# Every setting', '', 'One line a key of a `.conf` file, as `mem_nb config` prints them. Any of them may follow a command: `mem_nb run configs/demo.conf seed=1`.']
    for section in fields(Config):
        cls = section.default_factory
        told = docments(cls, full=True)
        out += ['', f'## {section.name}', '', own_doc(cls), '', '| key | type | default | |', '|---|---|---|---|']
        out += [f"| `{keys[section.name,f.name]}` | `{f.type.__name__}` | `{cell_text(f.default)}` | {cell_text(told[f.name].docment or '')} |" for f in fields(cls)]
    return '\n'.join(out) + '\n'

# ---- pictures
def stored_picture(path, cell_id) -> bytes:
    "The first PNG that a cell stored."
    cell = next(c for c in nbformat.read(path, as_version=4).cells if c.get('id')==cell_id)
    return base64.b64decode(next(o.data['image/png'] for o in cell.outputs if 'image/png' in o.get('data', {})))

def gallery(folder):
    "The pictures that docs/gallery.json names, with the notebooks that draw them."
    folder.mkdir(parents=True, exist_ok=True)
    out = ['# Gallery', '', 'Drawn by the notebooks; below each picture stands the one that draws it.']
    for k in json.loads((ROOT/'docs'/'gallery.json').read_text(encoding='utf-8')):
        path = ROOT/'nbs'/f"{k['notebook']}.ipynb"
        name = f"{path.stem}_{k['cell']}.png"
        (folder/name).write_bytes(stored_picture(path, k['cell']))
        page = f"../{'' if '/' in k['notebook'] else 'notebooks/'}{k['notebook']}.ipynb"
        out += ['', f"## {k['title']}", '', f"![{k['title']}]({name})", '', f"{k['says']} [`{path.stem}`]({page})"]
    (folder/'index.md').write_text('\n'.join(out) + '\n', encoding='utf-8')

# ---- all of it
def write_source():
    "The Markdown and notebooks that sphinx reads, below _proc/docs."
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(ROOT/'docs', SOURCE)
    links = all_links('..')
    for kind,paths in (('notebooks', notebooks()), ('tutorials', notebooks(ROOT/'nbs'/'tutorials'))):
        (SOURCE/kind).mkdir(exist_ok=True)
        pages = {p.stem: as_page(p, links) for p in paths}
        for stem,nb in pages.items(): nbformat.write(nb, SOURCE/kind/f'{stem}.ipynb')
        rows = '\n'.join(f'| [{title(nb)}]({stem}.ipynb) | {subtitle(nb)} |' for stem,nb in pages.items())
        head = {'notebooks': '# The notebooks\n\nThe code, told: each notebook is a module of the same name, and each runs from top to bottom.',
                'tutorials': '# Tutorials\n\nEach runs from top to bottom, offline, and ends with one thing done.'}[kind]
        toc = '\n'.join(pages)
        (SOURCE/kind/'index.md').write_text(f'{head}\n\n| | |\n|---|---|\n{rows}\n\n```{{toctree}}\n:hidden:\n\n{toc}\n```\n', encoding='utf-8')
    reference(SOURCE/'reference')
    gallery(SOURCE/'gallery')
    for md in (SOURCE/'howto').glob('*.md'): md.write_text(linked(md.read_text(encoding='utf-8'), links), encoding='utf-8')
    (SOURCE/'changelog.md').write_text((ROOT/'CHANGELOG.md').read_text(encoding='utf-8'), encoding='utf-8')
    (SOURCE/'results.md').write_text((ROOT/'benchmarks'/'RESULTS.md').read_text(encoding='utf-8'), encoding='utf-8')
    for picture in (ROOT/'benchmarks').glob('*.svg'): shutil.copy(picture, SOURCE)       # which it shows

class Page(HTMLParser):
    "Collects what a page links to, what it loads, and where it can be linked to."
    def __init__(self): super().__init__(); self.links,self.loads,self.ids = [],[],set()
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        if tag=='a' and a.get('href'): self.links.append(a['href'])
        if tag in ('img','script','iframe','source') and a.get('src'): self.loads.append(a['src'])
        if tag=='link' and a.get('href') and a.get('rel') not in ('canonical',): self.loads.append(a['href'])

def dead_links(site) -> list:  # sentences
    "Links within the site that lead nowhere, and anything that a page would load from elsewhere."
    pages = {}
    for p in site.rglob('*.html'): (parser := Page()).feed(p.read_text(encoding='utf-8')); pages[p.resolve()] = parser
    found = []
    for p,page in pages.items():
        here = p.relative_to(site.resolve())
        found += [f'{here} loads {u}' for u in page.loads if urlsplit(u).netloc]
        for u in page.links + page.loads:
            parts = urlsplit(u)
            if parts.scheme or parts.netloc: continue
            target = (p.parent/unquote(parts.path)).resolve() if parts.path else p
            if not target.is_file(): found.append(f'{here}: {u}')
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids: found.append(f'{here}: {u}')
    return sorted(set(found))

def addresses(site) -> list:  # sentences
    "Pages that show a place in memory."
    found = [(p.relative_to(site), ADDRESS.search(html.unescape(p.read_text(encoding='utf-8')))) for p in sorted(site.rglob('*.html'))]
    return [f'{p} shows {m[0]}' for p,m in found if m]

def undocumented(site) -> list:  # names
    "Public names without a place in the reference, or without a sentence."
    import sphinx.util.inventory as inventory
    known = inventory.InventoryFile.loads((site/'objects.inv').read_bytes(), uri='')
    known = {name for kind,names in known.data.items() if kind.startswith('py:') for name in names}
    names = [(m,n) for m,_ in modules() for n in public(m)]
    offered = [(f'{m}.{n}', getattr(import_module(f'mem_nb.{m}'), n)) for m,n in names]
    methods = [(f'{name}.{k}', f) for name,o in offered if inspect.isclass(o) for k,f in vars(o).items() if k[0]!='_' and inspect.isfunction(f) and f.__module__==o.__module__]
    silent = [f'{name} (no docstring)' for name,o in offered+methods if callable(o) and not own_doc(o)]
    return [f'{m}.{n}' for m,n in names if f'mem_nb.{m}.{n}' not in known] + silent

def main():
    write_source()
    made = SOURCE.parent/'built'/'html'     # myst-nb leaves its pictures beside it
    shutil.rmtree(made.parent, ignore_errors=True)
    failed = build_main(['-q', '-j', '2', '-W', '--keep-going', '-b', 'html', '-d', str(made.parent/'doctrees'), str(SOURCE), str(made)])
    shutil.rmtree(SITE, ignore_errors=True)
    made.rename(SITE)
    dead,silent,places = dead_links(SITE),undocumented(SITE),addresses(SITE)
    print(f'{len(list(SITE.rglob("*.html")))} pages in {SITE.name}/; dead links: {len(dead)}; undocumented public names: {len(silent)}; addresses of memory: {len(places)}')
    for line in dead[:30]+silent[:30]+places[:30]: print('  ', line)
    return failed or bool(dead) or bool(silent) or bool(places)

if __name__ == '__main__': sys.exit(main())
