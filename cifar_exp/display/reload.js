// Reloading keeps the scroll position. It waits while somebody reads values off the curves.
// A killed process cannot say that it has ended: a page that was drawn two minutes ago says so and reloads more slowly.
const drawn = new Date(document.lastModified), old = Date.now() - drawn > 120000;
if (old) {
  const news = document.createElement('span');
  news.className = 'badge stopped';
  news.textContent = `no news since ${drawn.toTimeString().slice(0, 5)}: the process may have been killed`;
  document.querySelector('header').append(news);
}
setInterval(() => { if (tip.hidden) location.reload(); }, old ? 30000 : 2000);
