"""A JupyterLab of our own, and Debian's Chromium in front of it: for the tests, and for the benchmark of the widgets.

    with lab(folder) as url, chromium() as open_page:
        nb = Notebook(open_page(), url, 'explorers.ipynb'); nb.run()
"""
import base64, hashlib, io, json, os, re, shutil, subprocess, sys, time, urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
import nbformat, numpy as np
from PIL import Image
from slurm_cluster import die_with_parent, free_ports

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {   # of JupyterLab: no news, no saving, every cell in the page
    '@jupyterlab/apputils-extension/notification.jupyterlab-settings': dict(
        fetchNews='false', checkForUpdates=False, doNotDisturbMode=True),
    '@jupyterlab/docmanager-extension/plugin.jupyterlab-settings': dict(autosave=False),
    '@jupyterlab/notebook-extension/tracker.jupyterlab-settings': dict(windowingMode='none', scrollPastEnd=False)}
ARGS = ['--no-sandbox','--disable-gpu','--disable-background-networking','--disable-dev-shm-usage']
READY = """async () => {
  const panel = jupyterapp.shell.currentWidget; await panel.context.ready; await panel.sessionContext.ready;
  const kernel = panel.sessionContext.session && panel.sessionContext.session.kernel;
  return !!kernel && kernel.connectionStatus === 'connected' && kernel.status === 'idle'; }"""
RUN = """() => { window.ended = '';
  jupyterapp.commands.execute('notebook:run-all-cells')
    .then(() => { window.ended = 'yes' }, e => { window.ended = String(e) }); }"""
ERRORS = """() => { const found = [], cells = jupyterapp.shell.currentWidget.content.model.cells;
  for (let i = 0; i < cells.length; i++) { const c = cells.get(i); if (c.type !== 'code') continue;
    for (const o of c.outputs.toJSON()) if (o.output_type === 'error')
      found.push(`cell ${i}: ${o.ename}: ${o.evalue} in\\n${c.sharedModel.getSource()}\\n${o.traceback.join('\\n')}`); }
  for (let i = 0; i < cells.length && !found.length; i++) { const c = cells.get(i);
    if (c.type === 'code' && c.sharedModel.getSource().trim() && c.executionCount === null) found.push(`cell ${i} was not run`); }
  return found; }"""
NAMES = """es => es.flatMap(e => [...e.classList]).filter(c => c.startsWith('mem-nb-')
  && !['mem-nb-picture','mem-nb-told'].includes(c)).map(c => c.slice(7))"""

def absent() -> str:
    "Why no notebook can be opened in a browser here, in words; '' where it can."
    if not shutil.which('chromium'): return 'no chromium here; as root: apt-get install chromium'
    lacks = [n for n in ('playwright','jupyterlab','anywidget') if not find_spec(n)]
    return f"no {', '.join(lacks)} here: pip install {' '.join(lacks)}" if lacks else ''

def copy_notebook(path:Path, to:Path, left_out:set):
    "The notebook without outputs; cells that are not run in a test become text, as nbdev_test leaves them out, too."
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.cell_type!='code': continue
        cell.outputs,cell.execution_count = [],None
        told = re.findall(r'^#\|\s*(.+?)\s*$', cell.source, flags=re.M)
        if left_out & {t.split()[0] for t in told} or 'eval: false' in told:
            cell.cell_type = 'raw'
            del cell['outputs'], cell['execution_count']
    to.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, to)

@contextmanager
def lab(root:Path):
    "The address of a JupyterLab that serves `root`, with settings of its own; it ends with the block."
    own,port = root/'.jupyter',free_ports(1)[0]
    for name,values in SETTINGS.items():
        path = own/'settings'/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    env = os.environ | {f'JUPYTER_{k}_DIR':str(own/k.lower()) for k in ('CONFIG','DATA','RUNTIME')} | dict(
        JUPYTERLAB_SETTINGS_DIR=str(own/'settings'), JUPYTERLAB_WORKSPACES_DIR=str(own/'workspaces'),
        IPYTHONDIR=str(own/'ipython'), MPLCONFIGDIR=str(own/'mpl'), PYTHONPATH=str(ROOT),
        WANDB_MODE='offline', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    for name in ('MPLBACKEND','TQDM_DISABLE'): env.pop(name, None)     # as a user has it
    with open(root/'jupyterlab.log', 'w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1',
            f'--port={port}', '--ServerApp.port_retries=0', f'--ServerApp.root_dir={root}', '--IdentityProvider.token=',
            '--expose-app-in-browser'], cwd=root, env=env, stdout=log, stderr=log, preexec_fn=die_with_parent)
        try:
            url = f'http://127.0.0.1:{port}'
            for _ in range(600):
                try: urllib.request.urlopen(f'{url}/api', timeout=5).read(); break
                except OSError:
                    if server.poll() is not None:
                        raise RuntimeError('JupyterLab ended: ' + (root/'jupyterlab.log').read_text()[-2000:])
                    time.sleep(.2)
            else: raise TimeoutError('JupyterLab did not answer in 2 minutes')
            yield url
        finally:
            server.terminate()
            try: server.wait(20)
            except subprocess.TimeoutExpired: server.kill(); server.wait()

@contextmanager
def chromium(width=1400, height=1000):
    "What opens a page of Debian's Chromium that reaches this machine only; `page.left` lists what it asked of others."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which('chromium'), args=ARGS)
        def open_page():
            page = browser.new_page(viewport=dict(width=width, height=height))
            page.left = []
            def only_here(route):
                if re.match(r'(https?|wss?)://127\.0\.0\.1[:/]|data:|blob:|file:', route.request.url): return route.continue_()
                page.left.append(route.request.url); route.abort()
            page.route('**/*', only_here)
            page.set_default_timeout(60_000)
            return page
        try: yield open_page
        finally: browser.close()

class Notebook:
    "A notebook opened in JupyterLab."
    def __init__(self, page, url, name):
        self.page,self.name = page,name
        page.goto(f'{url}/lab/tree/{name}?reset')
        page.wait_for_function("window.jupyterapp && jupyterapp.shell.currentWidget?.sessionContext", timeout=120_000)
        self._until(READY, 120)

    def _until(self, script, seconds):
        end = time.monotonic()+seconds
        while not self.page.evaluate(script):
            if time.monotonic()>end: raise TimeoutError(f'{self.name}: not after {seconds} s: {script}')
            time.sleep(.1)

    def run(self, seconds=300):
        "Run all cells; the errors in their outputs, as a list of texts."
        self.page.evaluate(RUN)
        self._until("() => window.ended", seconds)
        said = self.page.evaluate("() => window.ended")
        return self.errors() + ([] if said=='yes' else [said])

    def errors(self): return self.page.evaluate(ERRORS)
    def close(self):
        "End the kernel, so that the next notebook has the machine to itself."
        self.page.evaluate("async () => { await jupyterapp.shell.currentWidget.sessionContext.shutdown(); }")

    def explorers(self): return [Explorer(self.page, c) for c in self.page.locator('.jp-CodeCell:has(.mem-nb-picture)').all()]

class Control:
    "One control of an explorer; `moves` are what a hand can do to it."
    def __init__(self, explorer, name, root): self.explorer,self.name,self.root = explorer,name,root
    def kind(self):
        known = (('pick','select'), ('tick','input[type=checkbox]'), ('slide','.noUi-handle'))
        return next(k for k,css in known if self.root.locator(css).count())

    def value(self):
        kind = self.kind()
        if kind=='pick': return self.root.locator('select').input_value()
        if kind=='tick': return self.root.locator('input[type=checkbox]').is_checked()
        return float(self.root.locator('.noUi-handle').get_attribute('aria-valuenow'))

    def moves(self):
        "Moves as (words, function), the smallest first."
        kind = self.kind()
        if kind=='pick':
            w = self.root.locator('select')
            options = w.locator('option').evaluate_all('os => os.map(o => o.value)')
            return [(o, lambda o=o: w.select_option(value=o)) for o in options if o!=w.input_value()]
        if kind=='tick': return [('click', self.root.locator('input[type=checkbox]').click)]
        handle = self.root.locator('.noUi-handle')
        low,now,high = (float(handle.get_attribute(f'aria-value{w}')) for w in ('min','now','max'))
        keys = [k for k,room in (('ArrowRight',now<high), ('ArrowLeft',now>low), ('End',now<high), ('Home',now>low)) if room]
        return [(k, lambda k=k: (handle.focus(), handle.press(k))) for k in keys]

    def put(self, value):
        "Back to a value it had."
        kind = self.kind()
        if kind=='pick': self.root.locator('select').select_option(value=value)
        elif kind=='tick': self.root.locator('input[type=checkbox]').set_checked(value)
        else:
            readout = self.root.locator('.widget-readout')
            readout.fill(f'{value:g}'); readout.press('Enter')

class Explorer:
    "A panel in the page: its controls, its picture, and what it says below."
    def __init__(self, page, cell): self.page,self.cell,self.img = page,cell,cell.locator('img.mem-nb-picture')
    def count(self): return int(self.img.get_attribute('data-count'))
    def picture(self):
        "A word for the picture, the same for the same one; '' where there is none."
        return hashlib.sha256(self.img.get_attribute('src').encode()).hexdigest()[:12] if self.img.is_visible() else ''
    def pixels(self):
        "The picture as `(H, W, 3)` bytes."
        png = base64.b64decode(self.img.get_attribute('src').partition(',')[2])
        return np.asarray(Image.open(io.BytesIO(png)).convert('RGB'))
    def told(self): return self.cell.locator('.mem-nb-told').inner_text()
    def shot(self, path): self.cell.scroll_into_view_if_needed(); self.cell.locator('.jp-Cell-outputArea').screenshot(path=path)

    def controls(self):
        names = self.cell.locator('[class*="mem-nb-"]').evaluate_all(NAMES)
        return [Control(self, n, self.cell.locator(f'.mem-nb-{n}')) for n in dict.fromkeys(names)]

    def control(self, name): return next(c for c in self.controls() if c.name==name)

    def after(self, act, seconds=20):
        "The picture that answers an act; None where none came in a while."
        before = self.count()
        act()
        if not self._until(lambda: self.count()!=before, seconds): return None
        self.settled()
        return self.picture()

    def becomes(self, picture, seconds=30):
        "Whether the picture comes to be this one, and stays."
        self._until(lambda: self.picture()==picture, seconds)
        self.settled()
        return self.picture()==picture

    def _until(self, true, seconds):
        end = time.monotonic()+seconds
        while not true():
            if time.monotonic()>end: return False
            time.sleep(.02)
        return True

    def settled(self, quiet=.3, seconds=20):
        "Wait until no further picture follows."
        last,still,end = self.count(),time.monotonic(),time.monotonic()+seconds
        while time.monotonic()-still<quiet:
            if self.count()!=last: last,still = self.count(),time.monotonic()
            if time.monotonic()>end: raise TimeoutError(f'pictures still come after {seconds} s')
            time.sleep(.02)

    def click(self, u, v):
        "Click the picture at a share of its width and height."
        self.img.scroll_into_view_if_needed()
        box = self.img.bounding_box()
        self.img.click(position=dict(x=u*box['width'], y=v*box['height']))
