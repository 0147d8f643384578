"Shared by all tests: a tiny configuration, a tiny data set, and the folder of reference values where there is one."
import os
from pathlib import Path

os.environ.setdefault('TQDM_DISABLE', '1')
os.environ.setdefault('MPLBACKEND', 'agg')
import pytest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent/'shared'

TINY = """
data_set = digits
num_digits = 120
sensor_H = 34
sensor_W = 34
input_H = 32
input_W = 32
frame_fit = crop
normalize_gain = 2
flip = 0
time_flip = 0
rand_aug = 1
max_random_shift_evs = 2
num_tokens = 32
num_layers = 2
vae_hidden_dim = 16
vae_num_resnet_blocks = 1
vae_epochs = 4
vae_batch_size = 16
vae_lr = 2e-3
vae_grad_clip = 1
vae_save_ckpt_freq = 1
transformer_emb = 24
transformer_depth = 2
transformer_heads = 2
masking = block
num_mask_patches = 32
pt_epochs = 4
pt_batch_size = 16
pt_lr = 2e-3
pt_save_ckpt_freq = 1
class_methods = pretrained scratch
class_labels = 40
class_seeds = 0
class_epochs = 10
class_batch_size = 16
class_update_freq = 2
class_lr = 2e-3
class_warmup_epochs = 1
class_ema_decay = 0.9
class_save_ckpt_freq = 2
device = cpu
precision = fp32
log_every = 3
"""

@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    "A folder of simulated recordings, one folder a class."
    from mem_nb.simulate import simulate_digits
    root = tmp_path_factory.mktemp('digits')
    simulate_digits(root, 60, seed=0)
    return root

@pytest.fixture(scope='session')
def shared():
    "The folder of reference values and real recordings; tests that want it skip where it is absent."
    if not SHARED.is_dir(): pytest.skip('no folder shared/ beside the project')
    return SHARED

def damaged_counts():
    "What test_fuzz has counted in this process."
    import sys
    return {name:dict(c) for name,c in getattr(sys.modules.get('test_fuzz'), 'COUNTS', {}).items() if c}

FROM_WORKERS = {}      # the same, of the processes of pytest-xdist

def pytest_sessionfinish(session):
    if hasattr(session.config, 'workeroutput'): session.config.workeroutput['damaged'] = damaged_counts()

@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error): FROM_WORKERS.update(getattr(node, 'workeroutput', {}).get('damaged', {}))

def pytest_terminal_summary(terminalreporter):
    "How many damaged files were decoded and refused, by format."
    counts = FROM_WORKERS | damaged_counts()
    if counts: terminalreporter.section('damaged files')
    for name,c in counts.items(): terminalreporter.write_line(f"{name:7s} {c.get('decoded', 0):5d} decoded {c.get('refused', 0):5d} refused")
