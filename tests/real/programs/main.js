// Timers, promises, files through the thread pool, hashes.
const fs = require('fs');
const crypto = require('crypto');
const lines = [];
let number = 0;
const timer = setInterval(async () => {
  const n = number++;
  if (n >= 300) return;
  await fs.promises.writeFile(`file${n}`, 'x'.repeat(n));
  const text = await fs.promises.readFile(`file${n}`);
  crypto.pbkdf2(text, 'salt', 50, 32, 'sha256', (error, key) => {
    if (error) throw error;
    lines[n] = key.toString('hex');
    if (n === 40) fs.writeFileSync('mid', '');
  });
}, 8);
const last = setInterval(() => {
  if (Object.keys(lines).length < 300 || !fs.existsSync('end')) return;
  clearInterval(timer);
  clearInterval(last);
  fs.writeFileSync('result', lines.join('\n'));
}, 10);
