"Weights go out: folders that come back the same, timm, ONNX, the hub."
import json, pytest, timm, torch
from safetensors.torch import load_file
from timm.models.beit import Beit
from conftest import TINY
from mem_nb.config import DataConfig, parse_config
from mem_nb.encoder import build_encoder, encoder_args, load_encoder
from mem_nb.finetune import build_classifier, finetune_config, run_name
from mem_nb.pretrain import MaskedAutoencoder, MaskedEventModel
from mem_nb.tokenizer import EventVAE, build_tokenizer
from mem_nb.train import save_weights, weights_hash, write_json
from mem_nb.weights import describe_model, export_onnx, from_pretrained, publish, push_to_hub, read_info, run_onnx, save_pretrained

tiny = dict(width=48, depth=2, heads=3)
DATA = DataConfig(input_H=32, input_W=32, normalize_gain=2., original=('uint8',))

def spread(model, seed=0):
    "Random weights everywhere."
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters(): p.data.normal_(std=.2, generator=g)
    return model.eval()

# ---- out: folders
def models():
    "One of each kind, with frames and what it makes of them."
    encoder,mask = build_encoder((16,32), 8, 3, **tiny),torch.tensor([[1,0]*4]*2, dtype=bool)
    kinds = dict(
        tokenizer=(EventVAE(3, 16, 8, 8, 3, 1, (2,4)), lambda m,x: m.decode(m.tokens(x))),
        encoder=(encoder, lambda m,x: m(x)),
        classifier=(build_encoder((16,32), 8, 3, **tiny, shared_bias=False, num_classes=5), lambda m,x: m(x)),
        token_classifier=(build_encoder((16,32), 8, 3, **tiny, num_classes=5, global_pool='token'), lambda m,x: m(x)),
        absolute=(build_encoder((16,32), 8, 3, **tiny, abs_pos=True), lambda m,x: m(x)),
        pretrain=(MaskedEventModel(encoder, 16), lambda m,x: m(x, mask)),
        mae=(MaskedAutoencoder(encoder, 32, 1, 2), lambda m,x: m(x, mask)),
        two_views=(MaskedEventModel(encoder, 16, contrast=True), lambda m,x: m(x, mask)),
        mae_two_views=(MaskedAutoencoder(encoder, 32, 1, 2, contrast=True), lambda m,x: m(x, mask)))
    return {k:(spread(m),f) for k,(m,f) in kinds.items()}

@pytest.mark.parametrize('name', list(models()))
def test_a_folder_gives_the_same_outputs(name, tmp_path):
    (model,f),x = models()[name],torch.rand(2,3,16,32)
    again = from_pretrained(save_pretrained(model, tmp_path/'m', DATA, {'accuracy':.5}))
    assert torch.equal(f(model, x), f(again, x)) and not again.training
    assert again.data==DATA and read_info(tmp_path/'m')['metrics']=={'accuracy':.5}
    kind,args = describe_model(model)
    assert describe_model(again)==(kind, args) and json.loads(json.dumps(args)).keys()==args.keys()

def test_the_card_says_what_it_is(tmp_path):
    folder = save_pretrained(models()['classifier'][0], tmp_path/'digits', DATA, {'val_accuracy':.91}, dict(data_hash='abc', split_hash='def'), 'cc0-1.0')
    card = (folder/'README.md').read_text()
    for word in ('license: cc0-1.0', '# digits', '| val_accuracy | 0.91 |', '| data_hash | abc |', '| split_hash | def |', '| slice_max_evs | 30000 |', 'from_pretrained'):
        assert word in card
    assert 'data_path' not in card

def test_folders_that_do_not_fit_are_told(tmp_path):
    folder = save_pretrained(models()['encoder'][0], tmp_path/'m', DATA)
    with pytest.raises(ValueError, match='of kind encoder, not tokenizer'): from_pretrained(folder, 'tokenizer')
    info = read_info(folder)
    write_json(dict(info, data=dict(info['data'], tomorrow=1)), folder/'config.json')
    with pytest.raises(ValueError, match='unknown keys tomorrow; a newer mem_nb'): from_pretrained(folder)
    write_json(dict(info, model=dict(info['model'], depth=3)), folder/'config.json')
    with pytest.raises(ValueError, match='missing: blocks.2'): from_pretrained(folder)
    write_json(dict(info, kind='thing'), folder/'config.json')
    with pytest.raises(ValueError, match="unknown kind of model 'thing'; known: tokenizer"): from_pretrained(folder)
    (folder/'config.json').write_text('{')
    with pytest.raises(ValueError, match='config.json is damaged'): from_pretrained(folder)
    write_json({}, folder/'config.json')
    with pytest.raises(ValueError, match='was not written by'): from_pretrained(folder)
    with pytest.raises(FileNotFoundError): from_pretrained(tmp_path/'nowhere')
    with pytest.raises(TypeError, match='Linear is no model'): save_pretrained(torch.nn.Linear(1,1), tmp_path/'x')

def test_steps_of_a_run_are_published(tmp_path):
    "From files as `fit` leaves them."
    cfg,x = parse_config(TINY, [f'runs_dir={tmp_path}', 'data_path=somewhere']),torch.rand(2,3,32,32)
    one = f"finetune/{run_name('pretrained', 40, 0)}"
    made = {'tokenizer':build_tokenizer(cfg), one:build_classifier(cfg, 10),
            'pretrain':MaskedEventModel(build_encoder((32,32), 4, width=24, depth=2, heads=2), 32)}
    for step,m in made.items():
        save_weights(spread(m), cfg.folder/step/'final.safetensors')
        write_json(dict(metrics=dict(loss=1.), settings=dict(data_hash='abc', vae_lr=1)), cfg.folder/step/'final.json')
        with pytest.warns(UserWarning, match='no split_hash: .* is gone'): again = from_pretrained(publish(cfg, step, tmp_path/'out'/step))
        inner = getattr(m, 'encoder', m) if step=='pretrain' else m
        assert torch.equal(again(x)[0], inner(x)[0]) if step!='tokenizer' else torch.equal(again.tokens(x), m.tokens(x))
        assert again.data.normalize_gain==2 and read_info(tmp_path/'out'/step)['training']['data_hash']=='abc'
    with pytest.raises(ValueError, match='known: tokenizer'): publish(cfg, 'segmnt', tmp_path/'x')
    with pytest.raises(FileNotFoundError, match='mem_nb finetune'): publish(cfg, 'finetune/none', tmp_path/'x')

def test_what_is_published_has_the_frames_that_it_was_trained_on(tmp_path):
    cfg,one = parse_config(TINY, [f'runs_dir={tmp_path}', 'input_H=16', 'input_W=64', 'class_input_H=32', 'class_input_W=64', 'num_mask_patches=30']),'finetune/one'
    made = {'tokenizer':(build_tokenizer(cfg), (16,64)), one:(build_classifier(finetune_config(cfg), 10), (32,64))}
    for step,(m,size) in made.items():
        save_weights(spread(m), cfg.folder/step/'final.safetensors')
        write_json(dict(metrics={}, settings={}), cfg.folder/step/'final.json')
        again,x = from_pretrained(publish(cfg, step, tmp_path/'out'/step)),torch.rand(2,3,*size)
        assert (again.data.input_H,again.data.input_W)==size
        if step==one: assert torch.equal(again(x), m(x))
        else: assert again.decode(again.tokens(x)).shape==x.shape and torch.equal(again.decode(again.tokens(x)), m.decode(m.tokens(x)))

@pytest.mark.parametrize('kind', ['encoder','pretrain'])
def test_a_folder_is_a_start(kind, tmp_path):
    "As pt_checkpoint and class_checkpoint take it."
    model = models()[kind][0]
    folder = save_pretrained(model, tmp_path/'m')
    assert weights_hash(folder)==weights_hash(folder/'model.safetensors')!=''
    new = load_encoder(build_encoder((16,32), 8, 3, **tiny), folder)
    assert all(torch.equal(v, getattr(model, 'encoder', model).state_dict()[k]) for k,v in new.state_dict().items())

# ---- out: timm and ONNX
@pytest.mark.parametrize('name', ['encoder','classifier','absolute'])
def test_timm_takes_the_weights_by_itself(name, tmp_path):
    (model,f),x = models()[name],torch.rand(2,3,16,32)
    folder = save_pretrained(model, tmp_path/'m')
    plain = Beit(**encoder_args(model)).eval()
    plain.load_state_dict(load_file(folder/'model.safetensors'), strict=True)
    assert torch.equal(plain(x), model(x))
    torch.testing.assert_close(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(x), model(x), atol=1e-6, rtol=0)

def test_timm_knows_the_names(tmp_path):
    assert timm.list_models('mem_*')==['mem_base_patch16_224','mem_small_patch16_224','mem_tiny_patch4_32']
    with torch.device('meta'):
        for name,own in dict(mem_base_patch16_224=(768,12,12,16), mem_small_patch16_224=(384,12,6,16), mem_tiny_patch4_32=(96,4,3,4)).items():
            m = timm.create_model(name)
            assert (m.embed_dim, len(m.blocks), m.blocks[0].attn.num_heads, m.patch_embed.patch_size[0])==own
            size = m.patch_embed.img_size
            ours = build_encoder(size, own[3], width=own[0], depth=own[1], heads=own[2])
            assert {k:v.shape for k,v in m.state_dict().items()}=={k:v.shape for k,v in ours.state_dict().items()}
    ours = build_encoder((32,32), 4, width=96, depth=4, heads=3, shared_bias=False, num_classes=7)
    timm.create_model('mem_tiny_patch4_32', num_classes=7).load_state_dict(ours.state_dict())
    levels = timm.create_model('mem_tiny_patch4_32', features_only=True)(torch.rand(1,3,32,32))
    assert [tuple(v.shape) for v in levels]==[(1,96,8,8)]*3

@pytest.mark.parametrize('name', ['encoder','classifier'])
def test_onnx_computes_the_same(name, tmp_path):
    pytest.importorskip('onnxscript'); pytest.importorskip('onnxruntime')
    model,f = models()[name]
    export_onnx(model, tmp_path/'m.onnx')
    assert not model.training
    for n in (1,3):
        x = torch.rand(n,3,16,32)
        torch.testing.assert_close(torch.from_numpy(run_onnx(tmp_path/'m.onnx', x)), model(x).detach(), atol=1e-5, rtol=1e-5)

def test_only_encoder_and_classifier_are_exported(tmp_path):
    with pytest.raises(TypeError, match='of a pretraining its `.encoder`'): export_onnx(models()['pretrain'][0], tmp_path/'m.onnx')

def test_the_hub_is_asked_only_for_a_folder_of_ours(tmp_path, monkeypatch):
    import huggingface_hub
    calls = []
    class Api:
        def create_repo(self, repo, **kw): calls.append((repo, kw))
        def upload_folder(self, **kw): calls.append(kw); return 'address'
    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    with pytest.raises(FileNotFoundError): push_to_hub(tmp_path, 'me/model')
    assert not calls
    assert push_to_hub(save_pretrained(models()['encoder'][0], tmp_path/'m'), 'me/model')=='address'
    assert calls[0]==('me/model', dict(private=True, exist_ok=True)) and calls[1]['folder_path']==str(tmp_path/'m')
