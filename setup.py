"Packaging of mem_nb: everything it says stands in settings.ini, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=['='], interpolation=None)
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
readme = here/'README.md'

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'].split(),
    author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0',
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '', long_description_content_type='text/markdown',
    packages=find_packages(include=['mem_nb', 'mem_nb.*']), python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={'formats': cfg['formats_requirements'].split(),
                    'dev': (cfg['dev_requirements'] + ' ' + cfg['formats_requirements']).split()},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=['Programming Language :: Python :: 3', 'License :: OSI Approved :: Apache Software License'],
)
