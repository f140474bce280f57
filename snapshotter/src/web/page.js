"use strict";
(() => {
  const live = document.getElementById("live");
  const again = async () => {
    try {
      const answer = await fetch("/live");
      if (!answer.ok) throw new Error(answer.status);
      live.innerHTML = await answer.text();
      live.classList.remove("gone");
    } catch {
      live.classList.add("gone");
    }
    setTimeout(again, document.hidden ? 10000 : 1000);
  };
  setTimeout(again, 1000);
})();
