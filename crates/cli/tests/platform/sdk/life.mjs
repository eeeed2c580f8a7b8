// A workspace's whole life through the public SDK, unmodified.
import assert from 'node:assert/strict';
import Oblien from 'oblien';
import { Runtime } from 'oblien/runtime';

const env = (name) => process.env[name] ?? assert.fail(`${name} is not set`);
const client = new Oblien({
  clientId: env('CASEMATE_CLIENT_ID'),
  clientSecret: env('CASEMATE_CLIENT_SECRET'),
  baseUrl: env('CASEMATE_CONTROL_URL'),
});

const workspace = await client.workspaces.create({ image: 'python-3', name: 'sdk', mode: 'permanent' });
const id = workspace.id;
await client.workspaces.waitUntilReady(id);

const runtime = async () => {
  const { token } = await client.workspaces.apiAccess.enable(id);
  return new Runtime({ token, baseUrl: env('CASEMATE_GATEWAY_URL') });
};

// Dark: a valid token is not enough, and the error is the typed one.
let rt = await runtime();
await assert.rejects(() => rt.exec.run(['true']), (e) => e.status === 403 && e.code === 'network_blocked');
await client.workspaces.network.update(id, { public_access: true });
assert.equal((await client.workspaces.network.get(id)).public_access, true);

assert.equal(await rt.health(), true);
const run = await rt.exec.run(['python3', '-c', 'print(6 * 7)'], { execMode: 'direct' });
assert.equal(run.exit_code, 0);
assert.equal(run.stdout, '42\n');
const failed = await rt.exec.run(['sh', '-c', 'echo no >&2; exit 3'], { execMode: 'direct' });
assert.equal(failed.exit_code, 3);
assert.equal(failed.stderr, 'no\n');

let streamed = '';
let exit;
for await (const e of rt.exec.stream(['sh', '-c', 'echo one; echo two'], { execMode: 'direct' })) {
  if (e.event === 'stdout') streamed += Buffer.from(e.data, 'base64').toString();
  if (e.event === 'exit') exit = e.exit_code;
}
assert.equal(streamed, 'one\ntwo\n');
assert.equal(exit, 0);

await rt.files.mkdir({ path: '/root/sdk' });
await rt.files.write({ fullPath: '/root/sdk/a.txt', content: 'kept\n', createDirs: true });
assert.equal((await rt.files.read({ filePath: '/root/sdk/a.txt' })).content, 'kept\n');
assert.equal((await rt.files.stat({ path: '/root/sdk/a.txt' })).size, 5);
const listed = await rt.files.list({ dirPath: '/root/sdk' });
assert.deepEqual(listed.entries.map((e) => e.name), ['a.txt']);
await assert.rejects(() => rt.files.read({ filePath: '/root/sdk/none' }), (e) => e.status === 404);

// Paused, its memory stays and nothing answers; resumed, it does.
await client.workspaces.pause(id);
await assert.rejects(() => rt.exec.run(['true']), (e) => e.status === 409 && e.code === 'vm_not_running');
await client.workspaces.resume(id);
assert.equal((await rt.exec.run(['true'], { execMode: 'direct' })).exit_code, 0);

// A snapshot keeps the disk and the memory of its moment; restored, both are back.
await rt.exec.run(['sh', '-c', 'echo then > /dev/shm/m; echo then > /root/sdk/d; sync'], { execMode: 'direct' });
await client.workspaces.snapshots.create(id, { after: 'resume' });
await rt.exec.run(['sh', '-c', 'echo now > /dev/shm/m; echo now > /root/sdk/d; sync'], { execMode: 'direct' });
await client.workspaces.snapshots.restore(id);
await client.workspaces.waitUntilReady(id);
const back = await rt.exec.run(['cat', '/dev/shm/m', '/root/sdk/d'], { execMode: 'direct' });
assert.equal(back.stdout, 'then\nthen\n');
await rt.files.delete({ path: '/root/sdk/d' });

// Archives: made of paths, listed, described, deleted.
const { snapshots } = client.workspaces;
await rt.files.write({ fullPath: '/root/sdk/not/in.it', content: 'x', createDirs: true });
const made = await snapshots.createArchive(id, { format: 'tar', vm_paths: ['/root/sdk'], exclude_vm_paths: ['/root/sdk/not'] });
assert.equal(made.archive.version, '1');
assert.equal(made.archive.entries, 2); // the directory and a.txt
await snapshots.createArchive(id, { version: 'etc', vm_paths: ['/etc'] });
assert.deepEqual((await snapshots.listArchives(id)).map((a) => a.version), ['1', 'etc']);
const archive = await snapshots.getArchive(id, 'etc');
assert.equal(archive.format, 'tar');
assert.ok(archive.size > 0 && archive.size % 512 === 0 && !Number.isNaN(Date.parse(archive.created_at)));
await assert.rejects(() => snapshots.createArchive(id, { version: 'etc' }), (e) => e.status === 409);
await assert.rejects(() => snapshots.createArchive(id, { vm_paths: ['/none'] }), (e) => e.status === 422 && /vm_paths\[0\]/.test(e.message));
await assert.rejects(() => snapshots.createArchive(id, { format: 'zip' }), (e) => e.status === 422);
await snapshots.deleteArchive(id, 'etc', { delete_file: true });
await assert.rejects(() => snapshots.getArchive(id, 'etc'), (e) => e.status === 404);
await snapshots.deleteAllArchives(id, { delete_files: true });
assert.deepEqual(await snapshots.listArchives(id), []);
await rt.files.delete({ path: '/root/sdk/not/in.it' });

const lifecycle = await client.workspaces.lifecycle.get(id);
assert.equal(lifecycle.snapshot_supported, true);
assert.equal(lifecycle.mode, 'permanent');
assert.equal(lifecycle.restart_policy, 'always');
await client.workspaces.resources.update(id, { cpus: 2, apply: false });
assert.equal((await client.workspaces.resources.get(id)).resources.cpus, 2);

await client.workspaces.stop(id);
await assert.rejects(() => rt.exec.run(['true']), (e) => e.status === 409 || e.status === 403);
await client.workspaces.start(id);
await client.workspaces.waitUntilReady(id);
rt = await runtime();
assert.equal((await rt.files.read({ filePath: '/root/sdk/a.txt' })).content, 'kept\n');
await rt.files.delete({ path: '/root/sdk/a.txt' });

await client.workspaces.delete(id);
await assert.rejects(() => client.workspaces.get(id), (e) => e.status === 404);
await assert.rejects(() => client.workspaces.get('ws_0000000000000000'), (e) => e.status === 404);
console.log('all of it works');
