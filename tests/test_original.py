"Checkpoints of the original become our models, give its outputs, and cannot run code."
import argparse, pickle, warnings
from pathlib import Path
import numpy as np, pytest, torch
from timm.models.beit import Beit
from mem_nb.encoder import build_encoder, from_patches
from mem_nb.masking import hide_first
from mem_nb.original import ALLOWED, load_original, original_grid, read_original
from mem_nb.pretrain import MaskedEventModel, pixel_loss
from mem_nb.tokenizer import EventVAE, load_tokenizer
from mem_nb.weights import save_pretrained

GOLDEN = Path(__file__).parents[2]/'shared'/'golden'
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason='golden vectors are not here')
CKPT = GOLDEN/'ckpt'
tiny = dict(width=48, depth=2, heads=3)

def arrays(name): return {k:torch.from_numpy(np.asarray(v)) for k,v in np.load(GOLDEN/f'{name}.npz').items() if v.dtype.kind in 'fiub'}
def near(a, b, atol=1e-5): torch.testing.assert_close(a.detach(), b.to(a.dtype), atol=atol, rtol=0)
def spread(model, seed=0):
    "Random weights everywhere."
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters(): p.data.normal_(std=.2, generator=g)
    return model.eval()

# ---- in: the original's checkpoints
@golden
def test_tokenizer_of_the_original():
    z,vae = arrays('vae_ckpt'),load_original(CKPT/'vae_tiny.pt')
    assert isinstance(vae, EventVAE) and vae.grid==(8,8) and not vae.training
    assert torch.equal(vae.tokens(z['x']), z['indices'])
    near(vae.decode(z['indices']), z['decode'])

@golden
def test_pretraining_of_the_original():
    z,m = arrays('finetune_convert'),load_original(CKPT/'pt_tiny.pth')
    assert m.encoder.patch_embed.grid_size==(4,4) and m.encoder.blocks[0].attn.num_heads==3
    near(m(z['x'], z['mask']), z['pt_logits_masked'])

@golden
def test_pretraining_with_absolute_positions():
    "No position table to count heads in, none to leave empty."
    z = arrays('pt_vit')
    m = load_original(CKPT/'pt_tiny_abs.pth', heads=3)
    state = torch.load(CKPT/'pt_tiny_abs.pth', weights_only=True)['model']
    if all(torch.equal(state[k], z[f'abs/sd/{k}']) for k in state): near(m(z['x'], z['mask']), z['abs/logits_masked'])
    other = load_original(CKPT/'pt_tiny_abs.pth', heads=6)
    assert (m(z['x'], z['mask'])-other(z['x'], z['mask'])).abs().max() > 1e-4
    with pytest.raises(ValueError, match='heads cannot be told for width 48; say heads='): load_original(CKPT/'pt_tiny_abs.pth')

@golden
def test_finetuning_of_the_original_and_its_averaged_weights():
    z,m = arrays('ft_step'),load_original(CKPT/'ft_tiny_best.pth')
    assert isinstance(m, Beit) and m.num_classes==10
    near(m(z['x']), z['logits_after'])
    averaged = load_original(CKPT/'ft_tiny_best.pth', ema=True)
    for k,v in averaged.named_parameters(): near(v, z[f'ema/{k}'], 0)

@golden
@pytest.mark.parametrize('prefix', ['', 'cls/'])
def test_classifiers_of_either_pooling(prefix, tmp_path):
    z = arrays('ft_vit')
    torch.save({'model':{k[len(prefix)+3:]:v for k,v in z.items() if k.startswith(prefix+'sd/')}}, tmp_path/'x.pth')
    m = load_original(tmp_path/'x.pth')
    assert m.global_pool == ('token' if prefix else 'avg')
    near(m(z['x']), z[f'{prefix}logits'])

@golden
def test_autoencoder_of_the_original():
    z,m = arrays('mae'),load_original(CKPT/'mae_tiny.pth', heads=3, decoder_heads=4)
    mask = hide_first(-z['noise'], 8)
    assert torch.equal(mask, z['masked/mask'].bool())
    near(from_patches(m.forward_pixels(z['x'], mask), (32,32)), z['masked/pred_img'])
    near(pixel_loss(m(z['x'], mask), z['x'], mask), z['masked/loss'])

@golden
def test_classifier_that_began_as_an_autoencoder(tmp_path):
    "Plain blocks: qkv biases, no layer scale, no position table."
    z = arrays('mae')
    torch.save({'model':{k[9:]:v for k,v in z.items() if k.startswith('ftmae/sd/')}}, tmp_path/'x.pth')
    near(load_original(tmp_path/'x.pth', heads=3)(z['x']), z['ftmae/logits'])

@golden
def test_what_was_read_goes_on_as_a_folder_and_as_a_start(tmp_path):
    vae = load_original(CKPT/'vae_tiny.pt')
    folder = save_pretrained(vae, tmp_path/'vae')
    assert torch.equal(load_tokenizer(folder/'model.safetensors').codebook.weight, vae.codebook.weight)

@golden
def test_wrong_kind_and_geometry_are_told():
    with pytest.raises(ValueError, match='vae_tiny.pt: it is of kind tokenizer, not pretrain'): load_original(CKPT/'vae_tiny.pt', 'pretrain')
    with pytest.raises(ValueError, match='position tables of 80 rows, these have 52'): load_original(CKPT/'pt_tiny.pth', size=(32,48))
    with pytest.raises(ValueError, match='no averaged weights in it'): load_original(CKPT/'pt_tiny.pth', ema=True)
    with pytest.raises(ValueError, match='need as many positions, these weights have 16'): load_original(CKPT/'mae_tiny.pth', size=(32,48), heads=3)

# ---- in: without the originals
def saved(tmp_path, model, **more):
    "A file as the original's pretraining writes it."
    state = {k.removeprefix('encoder.').replace('head.', 'lm_head.'):v for k,v in model.state_dict().items()}
    state['rel_pos_bias.relative_position_index'] = model.encoder.rel_pos_bias.relative_position_index
    state |= more
    torch.save(dict(model={k:v for k,v in state.items() if v is not None}, epoch=1, args=argparse.Namespace(lr=np.float64(5e-4)),
                    optimizer=dict(param_groups=[dict(lr=np.float64(1), wd=np.float32(2), n=np.int64(3))])), tmp_path/'c.pth')
    return tmp_path/'c.pth'

def test_real_runs_hold_namespaces_and_numpy_scalars(tmp_path):
    m = spread(MaskedEventModel(build_encoder((32,32), 8, **tiny), 16))
    path = saved(tmp_path, m)
    assert read_original(path)['args'].lr==5e-4 and read_original(path)['optimizer']['param_groups'][0]['n']==3
    again = load_original(path)
    for k,v in m.state_dict().items(): assert torch.equal(again.state_dict()[k], v)

def test_what_is_assumed_is_said_and_what_the_arguments_tell_is_believed(tmp_path):
    m = spread(MaskedEventModel(build_encoder((16,64), 8, width=128, depth=2, heads=2, shared_bias=False, abs_pos=True), 16))
    state = {k.removeprefix('encoder.').replace('head.', 'lm_head.'):v for k,v in m.state_dict().items() if 'relative_position' not in k}
    torch.save(dict(model=state, args=argparse.Namespace(input_H=16, input_W=64)), tmp_path/'c.pth')
    with pytest.warns(UserWarning, match='taken: 2, of 64 numbers'): again = load_original(tmp_path/'c.pth')
    assert again.encoder.patch_embed.grid_size==(2,8)      # 16 positions alone would be a square
    with warnings.catch_warnings(action='error'): assert load_original(tmp_path/'c.pth', heads=4).encoder.blocks[0].attn.num_heads==4

@pytest.mark.parametrize('told', [dict(input_H=None, input_W=None), dict(input_H='32', input_W='32'), dict(input_H=240, input_W=180), {}])
def test_arguments_that_tell_nothing_or_something_else_are_passed_over(tmp_path, told):
    m = spread(MaskedEventModel(build_encoder((32,32), 8, **tiny), 16))
    state = {k.removeprefix('encoder.').replace('head.', 'lm_head.'):v for k,v in m.state_dict().items() if not k.endswith('index')}
    torch.save(dict(model=state, args=argparse.Namespace(**told)), tmp_path/'c.pth')
    assert load_original(tmp_path/'c.pth').encoder.patch_embed.grid_size==(4,4)

@pytest.mark.parametrize('size', [(16,32), (40,16), (8,32), (32,8), (8,8)])
def test_the_grid_is_read_off_the_position_index(size):
    index = build_encoder(size, 8, **tiny).rel_pos_bias.relative_position_index
    h,w = size[0]//8,size[1]//8
    found = original_grid({'x.relative_position_index':index}, 8)
    assert found==(h,w) or (1 in (h,w) and sorted(found)==sorted((h,w)))    # a single line of patches has one table, either way

def test_a_grid_that_cannot_be_known_is_asked_for():
    assert original_grid({'pos_embed':torch.zeros(1,17,8)}, 8)==(4,4)
    assert original_grid({'x.relative_position_bias_table':torch.zeros(13*13+3, 2)}, 8)==(7,7)
    with pytest.raises(ValueError, match=r'say size=\(H, W\)'): original_grid({'pos_embed':torch.zeros(1,16,8)}, 8)
    with pytest.raises(ValueError, match=r'say size=\(H, W\)'): original_grid({'x.relative_position_bias_table':torch.zeros(3*7+3, 2)}, 8)

class Harm:
    "Opened carelessly, it makes a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')

@pytest.mark.parametrize('protocol', ['zip','pickle'])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, protocol):
    harm,path = tmp_path/'harm',tmp_path/'evil.pth'
    if protocol=='zip': torch.save({'model':{'w':torch.zeros(1)}, 'args':Harm(harm)}, path)
    else: path.write_bytes(pickle.dumps({'model':Harm(harm)}))
    with pytest.raises(ValueError, match='was refused, and nothing in it was run'): load_original(path)
    assert not harm.exists()
    assert {getattr(a[0] if isinstance(a, tuple) else a, '__name__', '') for a in ALLOWED} <= {
        'Namespace','dtype','scalar','BoolDType','Int32DType','Int64DType','Float32DType','Float64DType'}

def test_allowed_names_do_not_stay_allowed(tmp_path):
    torch.save(argparse.Namespace(a=1), tmp_path/'n.pth')
    with pytest.raises(ValueError, match='holds a Namespace'): read_original(tmp_path/'n.pth')
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path/'n.pth', weights_only=True)

def test_missing_extra_and_unknown_are_named(tmp_path):
    m = spread(MaskedEventModel(build_encoder((32,32), 8, **tiny), 16))
    with pytest.raises(ValueError, match='missing: encoder.norm.bias'): load_original(saved(tmp_path, m, **{'norm.bias':None}))
    with pytest.raises(ValueError, match='extra: encoder.strange'): load_original(saved(tmp_path, m, strange=torch.zeros(1)))
    with pytest.raises(ValueError, match='missing: encoder.blocks.1.gamma_2'): load_original(saved(tmp_path, m, **{'blocks.1.gamma_2':None}))
    torch.save({'model':{'conv.weight':torch.zeros(1)}}, tmp_path/'r.pth')
    with pytest.raises(ValueError, match='no known kind.*first weights are conv.weight'): load_original(tmp_path/'r.pth')
    for broken,said in (({'model':None}, 'NoneType, not weights by name'), ({1:torch.zeros(1)}, 'first weights are missing'), ({'codebook.weight':torch.zeros(4,2)}, 'missing: encoder.0.0.weight'),
                        ({'lm_head.weight':torch.zeros(4,2), 'patch_embed.proj.weight':torch.zeros(32,3,4,4)}, 'missing: blocks.0.mlp.fc1.bias')):
        torch.save(broken, tmp_path/'b.pth')
        with pytest.raises(ValueError, match=f'b.pth: .*{said}'): load_original(tmp_path/'b.pth')
    (tmp_path/'t.pth').write_text('hello')
    with pytest.raises(ValueError, match='t.pth'): load_original(tmp_path/'t.pth')
    with pytest.raises(FileNotFoundError, match='nowhere'): load_original(tmp_path/'nowhere.pth')
