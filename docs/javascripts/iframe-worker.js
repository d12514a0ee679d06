// Browsers start no worker from a page that was opened as a file, so the search of the site would not
// work without a server. For such pages this replaces Worker by one that runs its script in an invisible
// frame. (The site generator looks for "iframe-worker" in the name of this file.)
if (location.protocol === "file:") {
  window.Worker = class {
    #frame = document.createElement("iframe");
    #waiting = []; // messages from before the script was loaded
    onmessage = null;
    onerror = null;

    constructor(url) {
      this.#frame.hidden = true;
      document.body.append(this.#frame);
      const inside = this.#frame.contentWindow;
      inside.postMessage = (data) => setTimeout(() => this.onmessage?.({ data }));
      const script = this.#frame.contentDocument.createElement("script");
      script.src = new URL(url, location.href).href;
      script.onload = () => {
        for (const data of this.#waiting) inside.onmessage({ data });
        this.#waiting = null;
      };
      script.onerror = () => this.onerror?.(new Error(`${url}: not found`));
      this.#frame.contentDocument.body.append(script);
    }

    postMessage(data) {
      if (this.#waiting) this.#waiting.push(data);
      else this.#frame.contentWindow?.onmessage({ data });
    }

    terminate() {
      this.#frame.remove();
    }
  };
}
