"""The program that renders a chat template in a process of its own, for `rendering`.

It only shows that compiling and rendering end. What they give, and the errors of a template, are
seen by the rendering that follows.
"""

NO_MEMORY = 3
"""Exit status if the memory did not suffice."""
MEMORY_GIB = 2

CODE = f"""
import sys
sys.path = [path for path in sys.path if path]  # not the working directory
import json, resource
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_GIB} << 30,) * 2)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(Extension):
    tags = {{"generation"}}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

def refuse(message):
    raise ValueError(message)

try:
    request = json.loads(sys.stdin.buffer.read())
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: form
    template = environment.from_string(request["template"])
    values = {{"tools": None, "documents": None, **request["values"]}}
    for part in template.generate(**values):
        pass
except MemoryError:
    sys.exit({NO_MEMORY})
except Exception:
    pass
"""
