/* Search in pages opened from disk. Browsers refuse workers there, so the search script runs in
   a hidden frame. It is loaded as a file: the pages' policy allows no code written into them. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.title = "Search"
      this.ready = new Promise((resolve, reject) => {
        this.frame.addEventListener("load", () => {
          const inside = this.frame.contentWindow
          const script = inside.document.createElement("script")
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
          script.addEventListener("load", () => resolve(inside))
          script.addEventListener("error", () => reject(new Error(`can't load ${address}`)))
          script.src = new URL(address, location.href).href
          inside.document.body.append(script)
        }, { once: true })
      })
      document.body.append(this.frame)
    }
    postMessage(data) {
      this.ready.then((inside) => {
        inside.dispatchEvent(new inside.MessageEvent("message", { data }))
      })
    }
    terminate() {
      this.frame.remove()
    }
  }
}
