"A run with pixels as targets, from recordings to what others open: `mae = 1` is honoured in every later step."
import json, pytest, torch
from conftest import TINY
from mem_nb.config import parse_config
from mem_nb.data import all_frames
from mem_nb.datasets import prepared
from mem_nb.encoder import attention_maps, config_encoder, features, load_encoder
from mem_nb.finetune import load_classifier
from mem_nb.inside import attention_from, bias_maps, nearest
from mem_nb.pipeline import run, steps_of
from mem_nb.pretrain import MaskedAutoencoder, build_model, pretrain, pretrain_task, strip_figure
from mem_nb.state import load_weights, read_log
from mem_nb.store import EventStore
from mem_nb.weights import describe_model, from_pretrained, publish, read_info, save_pretrained

@pytest.fixture(scope='module')
def painted(tmp_path_factory):
    "A whole run without a tokenizer."
    root = tmp_path_factory.mktemp('mae')
    cfg = parse_config(TINY, [f'runs_dir={root}', f'data_path={root}/digits', 'mae=1', 'pt_norm_pix=1', 'pt_informative=0.2',
                              'num_digits=80', 'class_epochs=4', 'class_methods=pretrained', 'masking=event'])
    return cfg,run(cfg)

def test_there_is_no_tokenizer_and_nothing_asks_for_one(painted):
    cfg,summary = painted
    assert steps_of(cfg)==['prepare','pretrain','finetune','evaluate'] and not (cfg.folder/'tokenizer').exists()
    assert summary['left_out']==['tokenizer'] and {'val_loss','val_mean_frame'} <= summary['pretrain'].keys()
    assert {'pretrained','linear probe'} <= {r['method'] for r in summary['results']}
    page = (cfg.folder/'report.html').read_text()
    assert 'squared error of hidden pixels; the mean frame has' in page and 'hidden tokens' not in page
    assert (cfg.folder/'pretrain'/'media'/'strip.png').is_file()

def test_normalised_errors_are_in_units_of_a_patch_variance(painted):
    "Nothing but the mean target is known to the blind; on informative patches it is near 1."
    m = painted[1]['pretrain']
    assert .3 < m['val_mean_frame'] < 1.1 and all(r['loss']==r['loss'] for r in read_log(painted[0].folder/'pretrain'))

def test_finetuning_began_from_the_painter(painted):
    "The same draw from other weights is another result, and the folder knows where it came from."
    cfg,_ = painted
    final = json.loads((cfg.folder/'finetune'/'pretrained_40_seed0'/'final.json').read_text())
    from mem_nb.state import weights_hash
    assert final['settings']['start_hash']==weights_hash(cfg.folder/'pretrain') and final['settings']['mae'] is True
    assert load_classifier(cfg, 10, 'pretrained', 40, 0)(torch.rand(1,3,32,32)).shape==(1,10)

def test_the_encoder_goes_out_with_a_card(painted, tmp_path):
    cfg,_ = painted
    encoder,x = load_encoder(config_encoder(cfg), cfg.folder/'pretrain'/'final.safetensors').eval(),torch.rand(2,3,32,32)
    again = from_pretrained(publish(cfg, 'pretrain', tmp_path/'encoder'), 'encoder')
    assert torch.equal(again(x), encoder(x))
    card,info = (tmp_path/'encoder'/'README.md').read_text(),read_info(tmp_path/'encoder')
    assert '| mae | True |' in card and '| pt_norm_pix | True |' in card and '| val_mean_frame |' in card and 'tokens' not in info['metrics']
    assert info['training']['split_hash'] and not info['training'].get('tokenizer_hash')

def test_the_whole_painter_comes_back(painted, tmp_path):
    "Encoder and decoder, as a model of its own kind."
    cfg,_ = painted
    model = load_weights(build_model(cfg), cfg.folder/'pretrain'/'final.safetensors').eval()
    assert isinstance(model, MaskedAutoencoder) and describe_model(model)[0]=='mae'
    again,(x,mask) = from_pretrained(save_pretrained(model, tmp_path/'mae', cfg.data), 'mae'),(torch.rand(2,3,32,32), torch.arange(64).expand(2,-1)%2==0)
    assert torch.equal(again(x, mask), model(x, mask)) and again.data.normalize_gain==2

def test_inside_looks(painted):
    cfg,_ = painted
    encoder,frames = load_encoder(config_encoder(cfg), cfg.folder/'pretrain'/'final.safetensors').eval(),all_frames(EventStore(prepared(cfg), 'val'), cfg.data)[:6]
    assert attention_from(encoder, frames[0], (3,4)).shape==(2,8,8) and bias_maps(encoder).abs().max()>0   # the bias was trained
    torch.testing.assert_close(attention_maps(encoder, frames[:1]).sum(-1), torch.ones(1,2,65), atol=1e-5, rtol=0)
    index,alike = nearest(features(encoder, frames), features(encoder, frames), 2)
    assert index[:,0].tolist()==list(range(6)) and (alike[:,0]>.999).all()

def test_the_strip_says_whose_scale_it_paints_with(painted):
    import matplotlib.pyplot as plt
    cfg,_ = painted
    fig = strip_figure(pretrain_task(cfg), load_weights(build_model(cfg), cfg.folder/'pretrain'/'final.safetensors'), 3)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()]==['frame','visible','predicted,\ntrue mean, std']
    plt.close(fig)

def test_tokens_are_not_asked_where_pixels_were(painted):
    "Another target in the same folder is refused by name."
    cfg,_ = painted
    other = parse_config(TINY, [f'runs_dir={cfg.run.runs_dir}', f'data_path={cfg.data.data_path}', 'mae=1', 'num_digits=80', 'masking=event', 'pt_informative=0.2'])
    with pytest.raises(ValueError, match='pt_norm_pix was True, is now False'): pretrain(other)
