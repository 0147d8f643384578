"Masked modelling: what the original computes, no peeking, honest baselines, exact resume."
from pathlib import Path
import numpy as np, pytest, torch, torch.nn.functional as F
from mem_nb.config import parse_config
from mem_nb.datasets import prepare
from mem_nb.store import EventStore
from mem_nb.finetune import rgb_start
from mem_nb.encoder import build_encoder, config_encoder, from_patches, from_vit, load_encoder, to_patches
from mem_nb.pretrain import (MaskedAutoencoder, MaskedEventModel, build_model, frozen_tokens, hidden_pixels, masked_accuracy,
                             masked_loss, pixel_loss, pretrain, pretrain_optimizer, pretrain_task, strip, strip_figure)
from mem_nb.tokenizer import build_tokenizer
from mem_nb.train import load_weights, read_log, save_weights

GOLDEN = Path(__file__).parents[2]/'shared'/'golden'
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason='golden vectors are not here')
tiny = dict(width=48, depth=3, heads=3)
t = torch.from_numpy

def ours(state):
    "The original's names as ours."
    other = {'lm_head.weight':'head.weight', 'lm_head.bias':'head.bias', 'mask_token':'mask_token'}
    return {other.get(k, f'encoder.{k}'):torch.as_tensor(v) for k,v in state.items() if not k.endswith('index')}
def part(z, prefix): return {k[len(prefix):]:z[k] for k in z.files if k.startswith(prefix)}
def model(**kw): return MaskedEventModel(build_encoder((32,32), 8, **tiny, **kw), 64).eval()

@golden
def test_logits_equal_the_original():
    "Weights of pt_tiny.pth; pt_vit.npz has no weights that belong to its logits, its `sd` are those after training."
    from argparse import Namespace
    z,m = np.load(GOLDEN/'finetune_convert.npz'),model()
    with torch.serialization.safe_globals([Namespace]):
        m.load_state_dict(ours(torch.load(GOLDEN/'ckpt'/'pt_tiny.pth', weights_only=True)['model']))
    torch.testing.assert_close(m(t(z['x']), t(z['mask'])), t(z['pt_logits_masked']), atol=1e-5, rtol=0)

@golden
def test_logits_equal_the_original_with_absolute_positions():
    z,m = np.load(GOLDEN/'pt_vit.npz'),model(abs_pos=True)
    m.load_state_dict(ours(part(z, 'abs/sd/')))
    torch.testing.assert_close(m(t(z['x']), t(z['mask'])), t(z['abs/logits_masked']), atol=1e-5, rtol=0)

@golden
def test_weight_decay_spares_what_the_original_spares():
    import json
    m = model()
    groups = json.loads((GOLDEN/'param_groups.json').read_text())['pt']
    names = {id(p):k for k,p in m.named_parameters()}
    for group in pretrain_optimizer(m, 1e-3, .05).param_groups:
        want = groups['decay' if group['weight_decay'] else 'no_decay']['params']
        assert {names[id(p)] for p in group['params']} == set(ours(dict.fromkeys(want, 0.)))
        assert group['betas'] == (.9,.95)

@golden
def test_autoencoder_equals_the_original():
    "Loss and pixels, with the encoder's plain blocks in the shared encoder."
    from timm.models.beit import Beit
    z = np.load(GOLDEN/'mae.npz')
    encoder = Beit((32,32), 8, num_classes=0, embed_dim=48, depth=2, num_heads=3, use_fc_norm=False)
    m = MaskedAutoencoder(encoder, 32, 2, 4).eval()
    state = {k:t(v) for k,v in part(z, 'sd/').items()}
    names = dict(decoder_embed='embed', decoder_blocks='blocks', decoder_norm='norm', decoder_pred='pixels')
    decoder = {names[k.split('.')[0]]+k[k.index('.'):]:v for k,v in state.items() if k.split('.')[0] in names}
    m.load_state_dict(decoder | {'mask_token':state['mask_token']}, strict=False)
    load_encoder(encoder, from_vit({k:v for k,v in state.items() if not k.startswith('decoder_') and k!='mask_token'}, encoder))
    x,mask = t(z['x']),t(z['masked/mask']).bool()
    torch.testing.assert_close(m.positions, state['decoder_pos_embed'][0], atol=1e-6, rtol=0)
    torch.testing.assert_close(from_patches(m.forward_pixels(x, mask), (32,32)), t(z['masked/pred_img']), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixel_loss(m(x, mask), x, mask), t(z['masked/loss']), atol=1e-6, rtol=0)

def random_masks(b, n=16, hidden=8, seed=0):
    return torch.rand(b, n, generator=torch.Generator().manual_seed(seed)).argsort(1) < hidden

@pytest.mark.parametrize('kind', ['tokens','pixels'])
def test_the_answer_does_not_depend_on_what_is_hidden(kind):
    torch.manual_seed(0)
    m = model(position_start='near') if kind=='tokens' else MaskedAutoencoder(build_encoder((32,32), 8, **tiny), 32, 1, 1).eval()
    frames,mask = torch.rand(3,3,32,32),random_masks(3)
    where = from_patches(mask[...,None].expand(-1,-1,192), (32,32))
    other = torch.where(where, torch.rand_like(frames), frames)
    with torch.no_grad(): a,b,c = m(frames, mask),m(other, mask),m(torch.where(where, frames, torch.rand_like(frames)), mask)
    assert a.shape[0] == mask.sum()
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert (a-c).abs().max() > 1e-4   # but on what is visible

def test_loss_and_accuracy_count_hidden_patches_only():
    g = torch.Generator().manual_seed(0)
    tokens,mask = torch.randint(64, (3,16), generator=g),random_masks(3)
    logits = torch.randn(int(mask.sum()), 64, generator=g)
    elsewhere = torch.where(mask, tokens, 0)
    assert masked_loss(logits, tokens, mask) == masked_loss(logits, elsewhere, mask)
    torch.testing.assert_close(masked_loss(logits*0, tokens, mask), torch.tensor(64.).log())
    assert masked_accuracy(F.one_hot(tokens[mask], 64), tokens, mask) == 1

def test_hidden_pixels_come_frame_after_frame():
    frames,mask = torch.rand(3,3,32,32),random_masks(3)
    assert torch.equal(hidden_pixels(frames, mask)[8], to_patches(frames, 8)[1][mask[1]][0])

def test_bf16_trains():
    for m in (model(), MaskedAutoencoder(build_encoder((32,32), 8, **tiny), 32, 1, 1)):
        with torch.autocast('cpu', torch.bfloat16): out = m(torch.rand(2,3,32,32), random_masks(2))
        out.float().sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)

TEXT = """
data_set = digits
num_digits = 40
sensor_H = 34
sensor_W = 34
input_H = 32
input_W = 32
frame_fit = crop
rand_aug = 0
num_tokens = 16
num_layers = 3
vae_hidden_dim = 8
vae_num_resnet_blocks = 0
transformer_emb = 32
transformer_depth = 2
transformer_heads = 2
num_mask_patches = 8
pt_epochs = 6
pt_batch_size = 16
pt_warmup_steps = 1000
log_every = 2
device = cpu
"""

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A folder with a store and a tokenizer that was never trained."
    root = tmp_path_factory.mktemp('pretrain')
    cfg = configure(root)
    prepare(cfg)
    torch.manual_seed(0)
    save_weights(build_tokenizer(cfg), root/'vae.safetensors')
    return root

def configure(root, *more):
    return parse_config(TEXT, [f'runs_dir={root}', f'data_path={root}/digits', 'vae_skip=1', f'vae_checkpoint={root}/vae.safetensors', *more])

@pytest.mark.parametrize('more', [(), ('mae=1',), ('masking=random',), ('masking=event','representation=histogram')])
def test_pretrain_runs_and_is_done_once(root, more):
    "Defect 13: more warm-up than steps does not crash; exactly the masks asked for."
    cfg = configure(root, f'expname=run{abs(hash(more))}', *more)
    final = pretrain(cfg)
    assert np.isfinite(list(final.values())).all() and pretrain(cfg) == final
    assert max(r['lr'] for r in read_log(cfg.folder/'pretrain')) > 2e-4
    assert {'val_mean_frame'} <= final.keys() if cfg.pretrain.mae else {'val_masked_accuracy','val_commonest'} <= final.keys()
    assert (cfg.folder/'pretrain'/'media'/'strip.png').exists()

def test_interrupted_pretraining_ends_with_the_same_weights(root, monkeypatch):
    whole,broken = configure(root, 'expname=whole', 'save_minutes=1e-9'),configure(root, 'expname=broken', 'save_minutes=1e-9')
    pretrain(whole)
    from mem_nb.pretrain import TokenTask
    judge,calls = TokenTask.judge,[]
    def stop(self, *args):
        calls.append(1)
        if len(calls)==7: raise KeyboardInterrupt
        return judge(self, *args)
    monkeypatch.setattr(TokenTask, 'judge', stop)
    with pytest.raises(KeyboardInterrupt): pretrain(broken)
    assert (broken.folder/'pretrain'/'last'/'state.pt').exists()
    pretrain(broken)
    assert len(calls) == 11+1   # step 7 was begun twice
    a,b = (load_weights(build_model(c), c.folder/'pretrain'/'final.safetensors').state_dict() for c in (whole, broken))
    assert all(torch.equal(a[k], b[k]) for k in a)

def test_validation_is_the_same_every_time_and_its_baseline_is_right(root):
    "Defect 6: no luck in validation."
    task = pretrain_task(configure(root))
    m = build_model(configure(root)).eval()
    assert task.validate(m) == task.validate(m)
    frames = torch.cat(list(task.shown(task.val, 'cpu')))
    mask = task.masks(frames, torch.Generator().manual_seed(1))
    assert (mask.sum(1)==8).all() and len(frames)==len(task.val)
    train = torch.cat([frozen_tokens(task.vae, f) for f in task.shown(task.train, 'cpu')])
    assert task.commonest[0] == train.flatten().mode().values
    found = task.tally(torch.zeros(int(mask.sum()), 16), frames, mask)
    torch.testing.assert_close(found['commonest'].float().mean(), (frozen_tokens(task.vae, frames)[mask]==task.commonest[0]).float().mean())

def test_strip_leaves_training_mode_alone(root):
    import matplotlib.pyplot as plt
    task,m = pretrain_task(configure(root)),build_model(configure(root)).train()
    plt.close(strip_figure(task, m, 3))
    assert m.training
    frames = torch.cat(list(task.shown(task.val, 'cpu', 3)))
    rows = strip(m.eval(), task.vae, frames, random_masks(3))
    assert list(rows) == ['frame','visible','tokenizer','predicted'] and all(v.shape==frames.shape for v in rows.values())
    assert torch.equal(to_patches(rows['visible'], 8)[random_masks(3)], torch.zeros(24, 192))

def test_a_pretraining_that_began_from_rgb_goes_on_from_its_own_weights(root, tmp_path):
    "What is kept after a loss that is no number has more than a plain ViT: nothing of it is lost."
    cfg = configure(root, 'pretrained=1', f'pt_checkpoint={tmp_path}/own.safetensors')
    torch.manual_seed(1)
    mine = MaskedEventModel(config_encoder(cfg), cfg.tokenizer.num_tokens)
    for p in mine.parameters(): p.data.normal_()
    save_weights(mine, tmp_path/'own.safetensors')
    again = build_model(cfg)
    assert all(torch.equal(v, again.state_dict()[k]) for k,v in mine.state_dict().items())

def test_an_encoder_alone_is_a_start_too(root, tmp_path, capsys):
    "As `save_pretrained` writes it."
    cfg = configure(root, f'pt_checkpoint={tmp_path}')
    torch.manual_seed(1)
    mine = config_encoder(cfg)
    save_weights(mine, tmp_path/'model.safetensors')
    again = build_model(cfg)
    assert all(torch.equal(v, again.encoder.state_dict()[k]) for k,v in mine.state_dict().items()) and 'encoder alone' in capsys.readouterr().out
    assert rgb_start(configure(root, 'pretrained=1', 'pt_skip=1')) and not rgb_start(configure(root, 'pretrained=1', 'pt_skip=1', f'pt_checkpoint={tmp_path}'))

def test_without_validation_recordings(root):
    cfg = configure(root, 'expname=noval', 'val_fraction=0', 'pt_epochs=1')
    assert len(EventStore(prepare(cfg), 'val'))==0 and np.isfinite(pretrain(cfg)['loss'])

def test_missing_tokenizer_and_missing_start_are_told(root):
    cfg = parse_config(TEXT, [f'runs_dir={root}', f'data_path={root}/digits', 'expname=fresh'])
    with pytest.raises(FileNotFoundError, match='tokenizer'): pretrain(cfg)
    with pytest.raises(ValueError, match='pt_checkpoint'): build_model(configure(root, 'pretrained=1'))
    with pytest.raises(FileNotFoundError, match='nowhere'): build_model(configure(root, 'pt_checkpoint=nowhere.safetensors'))

def test_start_from_rgb_weights(root):
    "pretrained = 1 with a local file of a plain vision transformer."
    from timm.models.vision_transformer import VisionTransformer
    vit = VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
    save_weights(vit, root/'vit.safetensors')
    m = build_model(configure(root, 'pretrained=1', f'pt_checkpoint={root}/vit.safetensors')).eval()
    x = torch.rand(2,3,32,32)
    torch.testing.assert_close(m.forward_features(x), vit.forward_features(x), atol=1e-4, rtol=1e-4)

def test_other_settings_refuse_an_old_folder(root):
    pretrain(configure(root, 'expname=old', 'pt_epochs=1'))
    with pytest.raises(ValueError, match='pt_lr'): pretrain(configure(root, 'expname=old', 'pt_epochs=1', 'pt_lr=1e-4'))

def test_weights_of_another_kind_and_masks_that_do_not_fit_are_told(root):
    with pytest.raises(ValueError, match='missing: .*encoder.*extra: .*codebook|missing: .*extra: '): build_model(configure(root, f'pt_checkpoint={root}/vae.safetensors'))
    for n in (0, 16, -1):
        with pytest.raises(ValueError, match='num_mask_patches'): configure(root, f'num_mask_patches={n}')

def test_two_views_take_the_target_from_the_frame_before_its_jitter(monkeypatch):
    from types import SimpleNamespace
    import mem_nb.pretrain as m
    from mem_nb.config import DataConfig
    monkeypatch.setattr(m, 'make_frames', lambda *a: (torch.zeros(2,3,16,16), torch.ones(2,3,16,16)) if a[-1] else torch.ones(2,3,16,16))
    seen = lambda two: (task := m.PixelTask(None, None, DataConfig(input_H=16, input_W=16), (2,2), 'random', 2, two_views=two),
                        setattr(task, 'judge', lambda out, target, mask, batch: (out, target.mean().item())), task.loss(lambda f,mask: f.mean().item(), SimpleNamespace(own=(slice(0,2),2)), 0, torch.Generator()))[-1]
    assert seen(True)==(1,0) and seen(False)==(1,1)
