"Packaging of mem_nb: everything it says stands in settings.ini, which nbdev reads too."
import shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
readme = here/'README.md'
extras = {k.removesuffix('_requirements'): v.split() for k,v in cfg.items() if k.endswith('_requirements')}
extras['dev'] = sum(extras.values(), [])   # who changes the code tests all of it
pythons = range(int(cfg['min_python'].split('.')[1]), 14)

class BuildWithConfigs(build_py):
    "The wheel also holds the configuration files, in mem_nb/configs; in a checkout they lie beside the package."
    def run(self):
        super().run()
        if not self.editable_mode: shutil.copytree(here/'configs', Path(self.build_lib)/cfg['lib_name']/'configs', dirs_exist_ok=True)

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '', long_description_content_type='text/markdown',
    packages=find_packages(include=['mem_nb', 'mem_nb.*']), package_data={'mem_nb': ['py.typed']}, python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(), extras_require=extras, cmdclass={'build_py': BuildWithConfigs},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=['Programming Language :: Python :: 3', 'Typing :: Typed', 'Intended Audience :: Science/Research',
                 'Framework :: Jupyter', *(f'Programming Language :: Python :: 3.{minor}' for minor in pythons)],
)
