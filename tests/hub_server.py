"""A small Hugging Face Hub on the loopback address: what huggingface_hub's client asks for when it pushes and pulls."""
import base64
import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

NOT_FOUND = dict(repo='RepoNotFound', revision='RevisionNotFound', entry='EntryNotFound')


class Hub:
    """What the server holds and has seen.

    `repos`: name -> `private` and `commits`, a list of (message, files); the branch `main` is its last one.
    `requests`: method and path of every request. `drop`: ('upload' or 'download') -> how many of them break off.
    `upload_mode`: 'lfs' or 'regular', of the weights. Tokens: 'hf_owner' may write, 'hf_guest' may not.
    """

    def __init__(self):
        self.repos, self.blobs, self.requests, self.drop = {}, {}, [], Counter()
        self.upload_mode, self.url = 'lfs', ''

    def put(self, name, **files):
        """Put files into a repository, without the client."""
        repo = self.repos.setdefault(name, dict(private=False, commits=[]))
        there = repo['commits'][-1][1] if repo['commits'] else {}
        repo['commits'].append(('put', {**there, **{k.replace('__', '.'): v for k, v in files.items()}}))

    def files(self, name):
        return self.repos[name]['commits'][-1][1]

    def sha(self, name, index=-1):
        commits = self.repos[name]['commits']
        return hashlib.sha1(f'{name} {range(len(commits))[index]}'.encode()).hexdigest()

    def at(self, name, revision):
        """Return the files and the commit of a revision, None where there is no such one."""
        for i, (_, files) in enumerate(self.repos[name]['commits']):
            if revision == self.sha(name, i) or (revision == 'main' and i + 1 == len(self.repos[name]['commits'])):
                return files, self.sha(name, i)
        return ({}, '0' * 40) if revision == 'main' else None


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args):
        pass

    def answer(self, status, content=b'', length=None, **headers):
        if isinstance(content, (dict, list)):
            content = json.dumps(content).encode()
            headers['Content_Type'] = 'application/json'
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(content) if length is None else length))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def missing(self, what):
        self.answer(404, {'error': f'{what} not found'}, X_Error_Code=NOT_FOUND[what])

    def hang_up(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)

    def handle_request(self):
        hub, path = self.server.hub, unquote(self.path.partition('?')[0])
        hub.requests.append(f'{self.command} {path}')
        length = int(self.headers.get('Content-Length') or 0)
        if self.command == 'PUT' and hub.drop['upload']:
            hub.drop['upload'] -= 1
            self.rfile.read(length // 2)
            return self.hang_up()
        body = self.rfile.read(length)
        who = (self.headers.get('Authorization') or '').removeprefix('Bearer ')
        if who not in ('', 'hf_owner', 'hf_guest'):
            message = 'Invalid credentials in Authorization header'
            return self.answer(401, {'error': message}, X_Error_Message=message)
        if self.command == 'PUT':
            if hashlib.sha256(body).hexdigest() != path.rpartition('/')[2]:
                return self.answer(400, {'error': 'not what was announced'})
            hub.blobs[path.rpartition('/')[2]] = body
            return self.answer(200)
        if path == '/api/validate-yaml':
            return self.answer(200, {})
        if path == '/api/repos/create':
            asked = json.loads(body)
            name = f'{asked["organization"]}/{asked["name"]}'
            if who != 'hf_owner':
                return self.answer(403, {'error': 'no rights'}, X_Error_Message='no rights')
            if name in hub.repos:
                return self.answer(409, {'error': 'there already'})
            private = asked.get('visibility') == 'private' or bool(asked.get('private'))
            hub.repos[name] = dict(private=private, commits=[])
            return self.answer(200, {'url': f'{hub.url}/{name}'})
        match = re.fullmatch(r'(?:/api/models)?/([^/]+/[^/.]+)(?:\.git)?(?:/(.*))?', path)
        name, rest = match.groups() if match else ('', '')
        if name not in hub.repos or (hub.repos[name]['private'] and who != 'hf_owner'):
            return self.missing('repo')
        action, _, rest = (rest or 'revision/main').partition('/')
        revision, _, file = rest.partition('/')
        if action == 'info':  # info/lfs/objects/batch
            objects = [dict(o, actions={'upload': {'href': f'{hub.url}/blobs/{o["oid"]}'}})
                       for o in json.loads(body)['objects']]
            return self.answer(200, {'transfer': 'basic', 'objects': objects})
        there = hub.at(name, revision)
        if there is None:
            return self.missing('revision')
        if action == 'revision':
            info = dict(id=name, sha=there[1], private=hub.repos[name]['private'], tags=[], downloads=0, likes=0,
                        siblings=[{'rfilename': f} for f in there[0]])
            return self.answer(200, info)
        if action == 'resolve':
            return self.resolve(file, *there)
        if who != 'hf_owner':
            return self.answer(403, {'error': 'no rights'}, X_Error_Message='no rights')
        if action == 'preupload':
            modes = [dict(path=f['path'], shouldIgnore=False,
                          uploadMode=hub.upload_mode if f['path'].endswith('.safetensors') else 'regular')
                     for f in json.loads(body)['files']]
            return self.answer(200, {'files': modes})
        if action == 'commit':
            return self.commit(name, [json.loads(line) for line in body.splitlines()])
        self.missing('entry')

    def resolve(self, file, files, sha):
        hub = self.server.hub
        if file not in files:
            return self.answer(404, X_Error_Code=NOT_FOUND['entry'], X_Repo_Commit=sha)
        content, tag = files[file], '"%s"' % hashlib.sha256(files[file]).hexdigest()
        start = int((self.headers.get('Range') or 'bytes=0-')[6:].split('-')[0])
        headers = dict(ETag=tag, X_Repo_Commit=sha, Accept_Ranges='bytes')
        if start:
            headers['Content_Range'] = f'bytes {start}-{len(content) - 1}/{len(content)}'
        rest = content[start:]
        if self.command == 'GET' and file.endswith('.safetensors') and hub.drop['download']:
            hub.drop['download'] -= 1
            self.answer(206 if start else 200, rest[:len(rest) // 2], len(rest), **headers)
            return self.hang_up()
        self.answer(206 if start else 200, rest, **headers)

    def commit(self, name, lines):
        hub, files, deleted = self.server.hub, {}, set()
        header = next(line['value'] for line in lines if line['key'] == 'header')
        if header.get('parentCommit', hub.at(name, 'main')[1]) != hub.at(name, 'main')[1]:
            return self.answer(412, {'error': 'the branch has moved on'})
        for line in lines:
            if line['key'] == 'file':
                files[line['value']['path']] = base64.b64decode(line['value']['content'])
            elif line['key'] == 'lfsFile':
                files[line['value']['path']] = hub.blobs[line['value']['oid']]
            elif line['key'] == 'deletedFile':
                deleted.add(line['value']['path'])
        kept = {k: v for k, v in hub.at(name, 'main')[0].items() if k not in deleted}
        hub.repos[name]['commits'].append((header['summary'], {**kept, **files}))
        oid = hub.sha(name)
        self.answer(200, {'commitUrl': f'{hub.url}/{name}/commit/{oid}', 'commitOid': oid})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request


@contextmanager
def serve():
    """Run a hub in a thread."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.hub = Hub()
    server.hub.url = f'http://127.0.0.1:{server.server_port}'
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
