// Reloading keeps the scroll position. It pauses while the pointer is on a curve.
// After a kill nobody updates the page: two minutes after the last update it shows a note and reloads more slowly.
const drawn = new Date(document.lastModified), old = Date.now() - drawn > 120000;
if (old) {
  const news = document.createElement('span');
  news.className = 'badge stopped';
  news.textContent = `not updated since ${drawn.toTimeString().slice(0, 5)}: the process may have been killed`;
  document.querySelector('header').append(news);
}
setInterval(() => { if (tip.hidden) location.reload(); }, old ? 30000 : 2000);
