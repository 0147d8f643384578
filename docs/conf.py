"Sphinx reads this from _proc/docs, where scripts/docs.py puts it; nothing is fetched, nothing is run."
project, author, copyright = 'mem_nb', 'The mem_nb authors', '2026 onwards, The mem_nb authors'
extensions = ['myst_nb']
html_theme = 'furo'
html_title = 'mem_nb'
html_static_path = ['static']
html_css_files = ['look.css']
html_theme_options = dict(light_css_variables={'color-brand-primary':'#0b6e99', 'color-brand-content':'#0b6e99'},
                          dark_css_variables={'color-brand-primary':'#6cc4ee', 'color-brand-content':'#6cc4ee'})
html_show_sourcelink = False
html_copy_source = False
nb_execution_mode = 'off'      # pages show what the notebooks stored
nb_ipywidgets_js = {}          # widgets appear as still pictures; their scripts would come from a CDN
nb_number_source_lines = False
myst_enable_extensions = ['colon_fence']
myst_heading_anchors = 4
exclude_patterns = ['images/*.md']
add_module_names = False
toc_object_entries = False
suppress_warnings = ['mystnb.unknown_mime_type', 'misc.highlighting_failure', 'myst.header']
