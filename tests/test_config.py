"Configuration: the published files load, and a mistake is an error that names the key."
import warnings
import pytest
from mem_nb.config import Config, check_config, conf_keys, config_diff, config_text, load_config, parse_config, save_config

@pytest.mark.parametrize('name', ['ncaltech','ncars','nimagenet'])
def test_published_files_load_unchanged_and_come_back_equal(shared, name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        cfg = load_config(shared/'original_configs'/f'{name}.conf')
    assert cfg.run.expname==name and cfg.tokenizer.num_tokens==8192 and cfg.grid==(14,14) and cfg.pretrain.num_mask_patches==98
    save_config(cfg, tmp_path/'run.conf')
    assert load_config(tmp_path/'run.conf')==cfg

def test_published_files_hold_69_known_keys(shared):
    lines = (shared/'original_configs'/'ncars.conf').read_text().splitlines()
    keys = [l.split('=')[0].strip() for l in lines if '=' in l and not l.strip().startswith('#')]
    assert len(keys)==69 and set(keys) <= set(conf_keys())

@pytest.mark.parametrize('text,said', [
    ('pt_epoch = 5', "did you mean 'pt_epochs'"),                 # defect 2: unknown keys are no longer dropped
    ('vae_lr = fast', 'vae_lr = .fast. should be a number'),
    ('pt_epochs = 1.5', 'should be a whole number'),
    ('mae = maybe', 'a switch, 0 or 1'),
    ('vae_loss = l1', 'known: mse, smooth_l1, cosine'),
    ('pt_lr = -1', 'pt_lr = -1.0 should be above 0'),
    ('class_dropout = 2', 'should lie in 0…1'),
    ('input_H = 225', 'multiples of the patch'),
    ('num_mask_patches = 196', '1…195'),
    ('num_mask_patches = 0', 'above 0'),
    ('transformer_heads = 7', 'multiple of transformer_heads'),
    ('class_labels = 10 some', 'class_labels has .some.'),
    ('class_methods = pretrianed', 'known: pretrained, scratch'),
    ('pt_lr = 1\npt_lr = 2', 'pt_lr'),
    ('[run]\npt_epoch = 3', 'without sections'),
    ('pt_epochs = inf', 'should be a whole number'),
    ('class_labels = 1e1', 'class_labels has 10.0'),
    ('class_seeds = a', 'class_seeds should be whole numbers'),
    ('seed = -1', 'whole numbers, 0 or above'),
    ('num_digits = 6000', '5000 pictures'),
    ('just words', 'a line is `key = value`')])
def test_mistakes_are_named(text, said):
    with pytest.raises((KeyError, ValueError), match=said): parse_config(text)

def test_defect_2_a_key_that_nothing_reads_is_told():
    with pytest.warns(UserWarning, match='class_lr_decay is read by nothing'): parse_config('class_lr_decay = 0.98')

def test_every_key_goes_there_and_back():
    cfg = Config()
    assert parse_config(config_text(cfg))==cfg
    assert config_diff(cfg, parse_config('', ['pt_lr=1', 'class_labels=5 0.5 all'])) == {'pt_lr':(5e-4,1.0), 'class_labels':(('all',),(5,.5,'all'))}

def test_the_projects_own_files_load(pytestconfig):
    files = sorted((pytestconfig.rootpath/'configs').glob('*.conf'))
    assert files
    for f in files: check_config(load_config(f))
